"""Centroids of the sampled frames.

Reads   the sample of `features`
Writes  centroids.safetensors, header.json

    python -m jahubert.run recipe=demo stage=kmeans iteration=1 kmeans.backend=torch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save_file

from jahubert.errors import ConfigError, DataError
from jahubert.train import ranks
from jahubert.train.config import free
from jahubert.train.health import watch_units
from jahubert.train.kmeans import fit_kmeans, inertia
from jahubert.train.masking import generator
from jahubert.train.provenance import read_record, write_json

VERSION = 1


@dataclass(frozen=True)
class Config:
    features: Path
    n_clusters: int = 100
    backend: Literal["auto", "torch", "faiss", "sklearn"] = "auto"
    n_init: int = 3  # starts; the best one is kept
    max_iter: int = 100
    held_out: float = 0.02  # share of the sample that only measures
    seed: int = 0
    device: str = free("auto")
    unhealthy: Literal["warn", "stop"] = free("warn")  # when clusters are too few, or one takes too much

    def __post_init__(self) -> None:
        if self.n_clusters < 2 or self.n_init < 1 or self.max_iter < 1 or not 0 <= self.held_out < 1:
            raise ConfigError(
                "n_clusters must be at least 2, n_init and max_iter at least 1, held_out in [0, 1)"
            )


class _Rows:
    """Some rows of a memory map, read as they are asked for: every process sees the sample, none holds it."""

    ndim = 2

    def __init__(self, array_ND: np.ndarray, rows: np.ndarray):
        self.array_ND, self.rows = array_ND, rows
        self.shape = (len(rows), array_ND.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array_ND[self.rows[index]]


def run(config: Config, out: Path) -> dict[str, Any]:
    sample_ND = np.load(config.features / "sample.npy", mmap_mode="r")
    test = generator(config.seed, 13).random(len(sample_ND)) < config.held_out
    if (~test).sum() < config.n_clusters:
        raise DataError(f"{config.features}: {(~test).sum()} frames cannot give {config.n_clusters} clusters")
    if config.backend in ("faiss", "sklearn") and ranks.rank():
        ranks.barrier()
        return {}  # they know one process only
    device = ranks.pick_device(config.device)
    result = fit_kmeans(
        _Rows(sample_ND, np.flatnonzero(~test)),
        config.n_clusters,
        backend=config.backend,
        n_init=config.n_init,
        max_iter=config.max_iter,
        seed=config.seed,
        device=device,
    )
    metrics = {
        "inertia": result.inertia,
        "used_clusters": int((result.counts_K > 0).sum()),
        "largest_share": float(result.counts_K.max() / result.counts_K.sum()),
        "reseeded": result.reseeded,
        "backend": result.backend,
    }
    if ranks.rank() == 0:
        if test.any():
            metrics["held_out_inertia"] = inertia(sample_ND[test], result.centroids_KD)
        beside = out / "centroids.safetensors.tmp"
        save_file({"centroids_KD": result.centroids_KD.float().contiguous()}, beside)
        beside.replace(out / "centroids.safetensors")
        write_json(out / "header.json", read_record(config.features / "header.json"))
        watch_units(result.counts_K.numpy(), str(out), stop=config.unhealthy == "stop")
    ranks.barrier()
    return metrics
