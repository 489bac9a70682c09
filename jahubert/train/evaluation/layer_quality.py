"""Which block of a model tells phones apart: the quality of units of each, on a bounded number of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.frames import HUBERT
from jahubert.model.hubert import HubertModel
from jahubert.train.clustering.features import Mfcc
from jahubert.train.clustering.kmeans import assign, fit_kmeans
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.data.masking import seeded_rng
from jahubert.train.evaluation.metrics import cluster_quality, joint_counts, phone_frames
from jahubert.train.experiment.progress import progress

_PER_CLUSTER = 50  # frames at least; with fewer, units follow single frames
_MAX_ITER = 30


class PhoneFrames:
    """Frames whose phone is known, of utterances drawn at random, and the quality of features of them.

    Every feature sees the same frames, so that its numbers compare with those of another.
    """

    def __init__(
        self, manifest: Manifest, times: Mapping[int, Sequence[Phone]], n_frames: int, seed: int = 0
    ):
        """`times`: phones of each row that has any; utterances are taken until `n_frames` frames are full."""
        said: list[str] = []
        self.manifest, self.device = manifest, torch.device("cpu")
        self.known: dict[int, np.ndarray] = {}  # row -> which of its frames
        rows = np.array(sorted(times))
        for row in seeded_rng(seed, 17).permutation(rows).tolist():
            if len(said) >= n_frames:
                break
            phones = phone_frames(times[row], HUBERT.n_frames(manifest[row].n_samples), HUBERT)
            known = [frame for frame, phone in enumerate(phones) if phone is not None]
            self.known[row] = np.array(known[: n_frames - len(said)], np.int64)
            said += [str(phones[frame]) for frame in self.known[row]]
        self.phones = sorted(set(said))
        index = {phone: number for number, phone in enumerate(self.phones)}
        self.phone_N = np.array([index[phone] for phone in said], np.int64)

    def __len__(self) -> int:
        return len(self.phone_N)

    def mfcc(self) -> Tensor:
        """(N, 39), at HuBERT's rate."""
        mfcc, step = Mfcc(), HUBERT.hop_ratio(Mfcc.grid)
        return torch.cat([mfcc([self.manifest.load(row)])[0][::step][at] for row, at in self.known.items()])

    def layers(self, model: HubertModel, device: torch.device) -> Tensor:
        """The output of every block, float32 (layers, N, D) on the CPU."""
        model = model.to(device).eval()
        numbers = range(1, model.config.layers + 1)
        parts = []
        with torch.no_grad(), progress("features of each layer", "utterances", len(self.known)) as done:
            for row, at in self.known.items():
                done(1)
                if not len(at):
                    continue
                kept = model(self.manifest.load(row)[None].to(device), keep_layers=numbers).layers
                parts.append(torch.stack([kept[number][0, torch.from_numpy(at)] for number in numbers]).cpu())
        return torch.cat(parts, dim=1).float()

    def quality(self, frames_ND: Tensor, n_clusters: int, seed: int = 0) -> dict[str, Any]:
        """Phone purity, cluster purity and PNMI of units that are fitted to these frames."""
        n_clusters = max(2, min(n_clusters, len(self) // _PER_CLUSTER))
        fitted = fit_kmeans(frames_ND, n_clusters, max_iter=_MAX_ITER, seed=seed)
        unit_N = assign(frames_ND, fitted.centroids_KD).numpy()
        counts_PK = joint_counts(self.phone_N, unit_N, len(self.phones), n_clusters)
        return {"n_units": n_clusters, **cluster_quality(counts_PK)}
