"""Labeling of all utterances with units: the unit of a frame is the index of the nearest centroid.

Reads   the manifest and the centroids; for units of a HuBERT layer, also the model with this layer
Writes  units.bin, offsets.npy, header.json (a LabelStore; features are not stored); for units of a HuBERT
        layer, also bundle/ with the model and the centroids for `jahubert units`

    python -m jahubert.run recipe=demo stage=label iteration=2

If `compare_with` is a label store for the same manifest, differences from its units are reported. If
`centroids` is a folder with fairseq's .tsv, .km and dict.km.txt files, the units in these files are imported.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jahubert.errors import DataError, quote
from jahubert.formats.bundle import save_bundle
from jahubert.frames import HUBERT
from jahubert.model.centroids import NearestCentroid
from jahubert.train.clustering.features import HubertLayer
from jahubert.train.clustering.streaming import (
    feature_header,
    load_centroids,
    make_feature,
    stream_features,
    to_host,
)
from jahubert.train.data.fairseq_files import import_units
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.unit_checks import (
    OnBadUnits,
    check_label_difference,
    check_units,
    usage_statistics,
)
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import model_field, raise_config_errors, range_errors, runtime_field
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.registry import FEATURES

VERSION = 1


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    centroids: Path  # output folder of the kmeans stage, or a folder with fairseq's files
    model: Path | None = model_field(None)  # for hubert: the model whose features were clustered
    layer: int | None = runtime_field(None)  # for hubert: layer to which the centroids must have been fitted
    # For hubert: precision of the features to which the centroids must have been fitted. The features are
    # always computed in this precision.
    precision: Literal["fp32", "bf16"] | None = runtime_field(None)
    # Custom feature extractor (module:attribute or file.py:attribute). Its code is imported only if the
    # centroids were fitted to its features.
    feature: str | None = runtime_field(None)
    compare_with: Path | None = runtime_field(None)  # label store that should contain the same units
    shard_size: int = runtime_field(2000)  # number of utterances per intermediate file
    device: str = runtime_field("auto")  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu
    # Maximum seconds of audio per batch. A longer utterance is a batch of its own.
    batch_seconds: float = runtime_field(80.0)
    workers: int = runtime_field(0)  # number of reading processes per device; 0: threads in this process
    # Whether to warn or raise an error if units are used too rarely or too unevenly, or differ from those in
    # `compare_with` (see jahubert/train/evaluation/unit_checks.py).
    on_bad_units: OnBadUnits = runtime_field("warn")

    def __post_init__(self) -> None:
        raise_config_errors(
            range_errors(
                self,
                {
                    "at least 1": ("layer", "shard_size"),
                    "at least 0": ("workers",),
                    "positive": ("batch_seconds",),
                },
            )
        )


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest = Manifest(config.manifest)
    metrics: dict[str, Any] = {}
    if any(config.centroids.glob("*.tsv")):
        # The hash of the files is recorded, because the files may change while all settings stay the same.
        metrics["content"] = distributed.rank0_broadcast(
            lambda: import_units(manifest, config.centroids, out, config.shard_size).header.centroids
        )
    else:
        write_units(config, manifest, out)
    store = LabelStore(out)
    count_K = store.unit_counts()
    distributed.rank0_broadcast(lambda: check_store(store, count_K, manifest, config))
    return metrics | {"units": int(count_K.sum()), **usage_statistics(count_K)}


def check_store(store: LabelStore, count_K: np.ndarray, manifest: Manifest, config: Config) -> None:
    """Report poor unit usage and differences from `compare_with`, as configured by `on_bad_units`."""
    check_units(count_K, str(store.folder), config.on_bad_units)
    if config.compare_with is not None:
        check_label_difference(LabelStore(config.compare_with), store, manifest, config.on_bad_units)


def write_units(config: Config, manifest: Manifest, out: Path) -> None:
    """Label all utterances with the centroids of the kmeans stage. All processes must call this function."""
    device = distributed.process_device(config.device)
    centroids_KD, fitted = load_centroids(config.centroids / "centroids.safetensors")
    if config.layer is not None and fitted["layer"] not in (None, config.layer):
        raise DataError(
            f"{config.centroids}: centroids were fitted to layer {fitted['layer']}, but features.layer is "
            f"{config.layer}; set label.centroids to centroids of layer {config.layer}, or rerun the "
            "stages features and kmeans"
        )
    precision = fitted.get("precision", "fp32")
    if config.precision is not None and fitted["layer"] is not None and precision != config.precision:
        raise DataError(
            f"{config.centroids}: centroids were fitted to features in {precision}, but features.precision "
            f"is {config.precision}; set features.precision={precision}, or rerun the stages features and "
            "kmeans"
        )
    # Centroid files are untrusted, so they must not determine which code is imported.
    if fitted["feature"] not in FEATURES and fitted["feature"] != config.feature:
        raise DataError(
            f"{config.centroids}: centroids were fitted to the custom feature {quote(fitted['feature'])}, "
            f"but features.kind is {quote(config.feature)}; if you trust its code, set features.kind to this "
            "feature"
        )
    feature = make_feature(fitted["feature"], config.model, fitted["layer"], device, precision)
    actual = feature_header(feature, fitted["feature"], fitted["layer"])
    mismatches = [
        f"{key} is {quote(actual.get(key))}, expected {quote(fitted[key])}"
        for key in fitted
        if actual.get(key) != fitted[key]
    ]
    if mismatches:
        raise DataError(
            f"{config.centroids}: the centroids were fitted to other features than those that "
            f"label.model={config.model or 'null'} yields: {'; '.join(mismatches)}"
        )
    header = LabelHeader(
        n_units=len(centroids_KD),
        feature=fitted["feature"],
        layer=fitted["layer"],
        centroids=hashlib.sha256(centroids_KD.numpy().tobytes()).hexdigest(),
        model=fitted["model"],
        manifest=manifest.fingerprint,
        normalize=fitted["normalize"],
        precision=precision,
    )
    n_frames = HUBERT.n_frames(manifest.n_samples)
    writer = LabelWriter(out, header, n_frames, shard_size=config.shard_size)
    step = HUBERT.hop_ratio(feature.grid)
    nearest = NearestCentroid(centroids_KD.to(device))
    # Rank 0 lists the pending shards for all ranks, because a rank that lists them later may see fewer.
    shards = distributed.rank0_broadcast(writer.pending)[distributed.rank() :: distributed.world()]
    with progress("labeling", "utterances", sum(len(writer.rows(shard)) for shard in shards)) as done:
        parts = (writer.rows(shard) for shard in shards)
        with closing(
            stream_features(manifest, feature, parts, config.batch_seconds, config.workers)
        ) as stream:
            labels = to_host((row, nearest.labels(f_SD[::step].to(device))) for row, f_SD in stream)
            for shard in shards:
                units = []
                for _, unit_S in islice(labels, len(writer.rows(shard))):
                    # The copy takes less memory and, on a GPU, releases the page-locked memory of the tensor.
                    units.append(unit_S.numpy().astype(header.dtype))
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
