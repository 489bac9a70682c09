"""K-means clustering of the sampled frames.

Reads   the sample of frames written by the features stage
Writes  centroids.safetensors, with the description of the feature in its metadata

With the backend `torch`, all processes share the work and read the sample in blocks, so that it need not fit
in memory.

    python -m jahubert.run recipe=demo stage=kmeans iteration=1 kmeans.backend=faiss
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jahubert.train.clustering.frames import FrameFile, Subset, draw_rows
from jahubert.train.clustering.kmeans import fit_kmeans, inertia
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.clustering.streaming import save_centroids
from jahubert.train.data.labels import MAX_UNITS
from jahubert.train.data.masking import seeded_rng
from jahubert.train.evaluation.unit_checks import OnBadUnits, check_units
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors, runtime_field, seed_field
from jahubert.train.experiment.provenance import read_record

VERSION = 2

# Settings that have no effect with each backend.
UNUSED_OPTIONS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "faiss": ("lloyd_frames",),
    "sklearn": ("n_init", "max_iter", "lloyd_frames"),
}


@dataclass(frozen=True)
class Config:
    features: Path  # output folder of the features stage
    n_clusters: int = 100  # number of clusters
    # Implementation of k-means. Only torch uses lloyd_frames, and sklearn uses neither n_init nor max_iter.
    backend: Literal["torch", "faiss", "sklearn"] = "torch"
    n_init: int = 3  # number of initializations, of which the best one is used
    max_iter: int = 100  # maximum number of passes over all frames, or over a sample (see lloyd_frames)
    # Maximum number of frames for Lloyd's algorithm. If there are more, the algorithm runs on a sample of
    # this size, and one mini-batch pass over all frames follows (backend torch only).
    lloyd_frames: int = 10_000_000
    held_out: float = 0.02  # fraction of the frames that are held out to evaluate the centroids
    seed: int = seed_field()  # random seed for held-out frames, samples and initial centroids
    device: str = runtime_field("auto")  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu
    # Whether to warn or raise an error if the clusters are used too rarely or too unevenly (see
    # jahubert/train/evaluation/unit_checks.py).
    on_bad_units: OnBadUnits = runtime_field("warn")

    def __post_init__(self) -> None:
        counts = {"at least 2": ("n_clusters",), "at least 1": ("n_init", "max_iter")}
        wrong = range_errors(self, counts | {"in [0, 1)": ("held_out",)})
        if self.n_clusters > MAX_UNITS:
            wrong.append(f"n_clusters is {self.n_clusters}, but must be at most {MAX_UNITS} (16-bit labels)")
        if self.lloyd_frames < self.n_clusters:
            wrong.append(
                f"lloyd_frames is {self.lloyd_frames}, but must be at least n_clusters ({self.n_clusters})"
            )
        raise_config_errors(wrong)


def run(config: Config, out: Path) -> dict[str, Any]:
    if config.backend in ("faiss", "sklearn"):  # faiss and sklearn run in a single process
        return distributed.rank0_broadcast(lambda: fit(config, out))
    metrics = fit(config, out)
    distributed.barrier()
    return metrics


def fit(config: Config, out: Path) -> dict[str, Any]:
    """Fit centroids, write them on rank 0, and return metrics."""
    sample_ND = FrameFile(config.features / "sample.npy")
    n_frames = len(sample_ND)
    held_out = draw_rows(n_frames, round(n_frames * config.held_out), seeded_rng(config.seed, 13))
    with distributed.rank0_reports():
        result = fit_kmeans(
            Subset(sample_ND, np.delete(np.arange(n_frames), held_out)),
            KmeansOptions(
                config.n_clusters,
                backend=config.backend,
                n_init=config.n_init,
                max_iter=config.max_iter,
                lloyd_frames=config.lloyd_frames,
                seed=config.seed,
                device=distributed.process_device(config.device),
            ),
        )
    metrics = {
        "inertia": result.inertia,
        "used_clusters": int((result.counts_K > 0).sum()),
        "largest_share": float(result.counts_K.max() / result.counts_K.sum()),
        "reseeded": result.reseeded,
        "backend": result.backend,
    }
    if distributed.rank() == 0:
        if len(held_out):
            metrics["held_out_inertia"] = inertia(Subset(sample_ND, held_out), result.centroids_KD)
        header = read_record(config.features / "header.json")
        save_centroids(out / "centroids.safetensors", result.centroids_KD, header)
        check_units(result.counts_K.numpy(), str(out), config.on_bad_units)
    return metrics
