"""Every utterance's units: audio -> feature -> nearest centroid -> label store, in one pass.

Reads   the manifest, the centroids, and the model whose layer they were fitted on
Writes  units.bin, offsets.npy, header.json (a LabelStore); no feature touches the disk.
        For units of a model's layer also bundle/: that model with its centroids, for `jahubert units`

    python -m jahubert.run recipe=demo stage=label iteration=2

With `compare_with`, another store of the same audio, it says how the two differ, if they do.
Where `centroids` is a folder of fairseq's .tsv, .km and dict.km.txt, its units are taken as they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jahubert.errors import DataError
from jahubert.formats.bundle import save_bundle
from jahubert.frames import HUBERT
from jahubert.train.clustering.features import HubertLayer
from jahubert.train.clustering.lloyd import Nearest
from jahubert.train.clustering.streaming import feature_header, load_centroids, make_feature, stream_features
from jahubert.train.data.fairseq_files import import_units
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.unit_checks import check_difference, check_units, unit_use
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import model_field, raise_config_errors, range_errors, runtime_field
from jahubert.train.experiment.progress import progress

VERSION = 1


@dataclass(frozen=True)
class Config:
    manifest: Path
    centroids: Path  # the folder of stage kmeans, or of fairseq's files
    model: Path | None = model_field(None)  # for hubert features: the model they were fitted on
    layer: int | None = runtime_field(None)  # for hubert features: centroids of another layer are refused
    compare_with: Path | None = runtime_field(None)  # a label store that should hold the same units
    shard_size: int = runtime_field(2000)  # utterances between two saves
    device: str = runtime_field("auto")
    batch_seconds: float = runtime_field(80.0)
    on_bad_units: Literal["warn", "error"] = runtime_field(
        "warn"
    )  # too few units, one that takes too much, another store that differs

    def __post_init__(self) -> None:
        raise_config_errors(
            range_errors(self, {"at least 1": ("layer", "shard_size"), "positive": ("batch_seconds",)})
        )


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest = Manifest(config.manifest)
    metrics: dict[str, Any] = {}
    if next(config.centroids.glob("*.tsv"), None) is None:
        label(config, manifest, out)
    else:
        given = (manifest, config.centroids, out, config.shard_size)
        # Those files may change without any setting: what comes after depends on what was in them.
        metrics["content"] = distributed.rank0_broadcast(lambda: import_units(*given).header.centroids)
    store = LabelStore(out)
    usage_K = store.unit_counts()
    distributed.rank0_broadcast(lambda: watch(store, usage_K, manifest, config))
    return metrics | {"units": int(usage_K.sum()), **unit_use(usage_K)}


def watch(store: LabelStore, usage_K: np.ndarray, manifest: Manifest, config: Config) -> None:
    """Warn, or stop where that is asked for, when the units look wrong or are not those of another store."""
    stop = config.on_bad_units == "error"
    check_units(usage_K, str(store.folder), stop)
    if config.compare_with is not None:
        check_difference(LabelStore(config.compare_with), store, manifest, stop)


def label(config: Config, manifest: Manifest, out: Path) -> None:
    """Units of our own centroids, by all processes."""
    device = distributed.process_device(config.device)
    centroids_KD, fitted = load_centroids(config.centroids / "centroids.safetensors")
    if config.layer is not None and fitted["layer"] not in (None, config.layer):
        raise DataError(
            f"{config.centroids}: centroids of layer {fitted['layer']}, but units of layer {config.layer} "
            "are asked for (features.layer); name the other folder as label.centroids, or make new ones"
        )
    feature = make_feature(fitted["feature"], config.model, fitted["layer"], device)
    made = feature_header(feature, fitted["feature"], fitted["layer"])
    wrong = [
        f"{key} is {made[key]!r}, the centroids want {fitted[key]!r}"
        for key in fitted
        if made[key] != fitted[key]
    ]
    if wrong:
        raise DataError(
            f"{config.model}: not the features that {config.centroids} was fitted on: {'; '.join(wrong)}"
        )
    header = LabelHeader(
        n_units=len(centroids_KD),
        feature=fitted["feature"],
        layer=fitted["layer"],
        centroids=hashlib.sha256(centroids_KD.numpy().tobytes()).hexdigest(),
        model=fitted["model"],
        manifest=manifest.fingerprint,
        normalize=fitted["normalize"],
    )
    n_frames = HUBERT.n_frames(manifest.n_samples)
    writer = LabelWriter(out, header, n_frames, shard_size=config.shard_size)
    step = HUBERT.hop_ratio(feature.grid)
    nearest = Nearest(centroids_KD.to(device))
    # Asked once: a process that asked later would see a shorter list, and share it out differently.
    shards = distributed.rank0_broadcast(writer.pending)[distributed.rank() :: distributed.world()]
    with progress("units", "utterances", sum(len(writer.rows(shard)) for shard in shards)) as done:
        for shard in shards:
            units = []
            for _, f_SD in stream_features(manifest, feature, writer.rows(shard), config.batch_seconds):
                units.append(nearest.labels(f_SD[::step].to(device)).cpu().numpy())
                done(1)
            writer.write(shard, units)
    distributed.barrier()
    if distributed.rank() == 0:
        writer.finish()
        if isinstance(feature, HubertLayer):
            save_bundle(
                out / "bundle",
                model=feature.model,
                centroids_KD=centroids_KD,
                centroid_layer=fitted["layer"],
                info={"units": vars(header)},
            )
    distributed.barrier()
