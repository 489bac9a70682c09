"""Quality of units from every layer, measured with k-means on sampled frames with known phones."""

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
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.data.masking import seeded_rng
from jahubert.train.evaluation.metrics import cluster_quality, joint_counts, phone_frames
from jahubert.train.experiment.progress import progress

_FRAMES_PER_CLUSTER = 50  # minimum mean number of frames per cluster; fewer would cause overfitting
_MAX_ITER = 30


class PhoneFrames:
    """Frames with known phones from randomly drawn utterances, on which features can be compared."""

    def __init__(
        self, manifest: Manifest, times: Mapping[int, Sequence[Phone]], n_frames: int, seed: int = 0
    ):
        """Draw utterances until they contain `n_frames` frames with phones, or all utterances are drawn.

        Args:
            times: mapping from manifest rows to the phones of the utterance.
            n_frames: maximum number of frames. The excess frames of the last utterance are dropped.
        """
        self.manifest = manifest
        self.frames_of_row: dict[int, np.ndarray] = {}
        symbols: list[str] = []
        rows = np.array(sorted(times))
        for row in seeded_rng(seed, 17).permutation(rows).tolist():
            if len(symbols) >= n_frames:
                break
            phones = phone_frames(times[row], HUBERT.n_frames(manifest[row].n_samples), HUBERT)
            frames = [frame for frame, phone in enumerate(phones) if phone is not None]
            frames = frames[: n_frames - len(symbols)]
            self.frames_of_row[row] = np.array(frames, np.int64)
            symbols += [str(phones[frame]) for frame in frames]
        self.phones = sorted(set(symbols))
        index = {phone: number for number, phone in enumerate(self.phones)}
        self.phone_N = np.array([index[phone] for phone in symbols], np.int64)

    def __len__(self) -> int:
        return len(self.phone_N)

    def mfcc(self) -> Tensor:
        """Compute MFCCs of the frames at HuBERT's frame rate, float32 (N, 39)."""
        mfcc = Mfcc()
        step = HUBERT.hop_ratio(Mfcc.grid)
        parts = []
        for row, frames in self.frames_of_row.items():
            mfcc_SC = mfcc([self.manifest.load(row)])[0]
            parts.append(mfcc_SC[::step][frames])
        return torch.cat(parts)

    def layers(self, model: HubertModel, device: torch.device) -> Tensor:
        """Compute the outputs of all layers for the frames, float32 (layers, N, D) on the CPU."""
        model = model.to(device).eval()
        numbers = range(1, model.config.layers + 1)
        parts = []
        n_rows = len(self.frames_of_row)
        with torch.no_grad(), progress("features of each layer", "utterances", n_rows) as done:
            for row, frames in self.frames_of_row.items():
                done(1)
                if not len(frames):
                    continue
                wav_1T = self.manifest.load(row)[None].to(device)
                outputs = model(wav_1T, keep_layers=numbers).layers
                index_N = torch.from_numpy(frames)
                parts.append(torch.stack([outputs[number][0, index_N] for number in numbers]).cpu())
        return torch.cat(parts, dim=1).float()

    def quality(self, frames_ND: Tensor, n_clusters: int, seed: int = 0) -> dict[str, Any]:
        """Fit `n_clusters` units to frames, and return phone purity, cluster purity and PNMI.

        If there are too few frames for `n_clusters`, fewer units are fitted. `n_units` in the result is the
        actual number.
        """
        n_clusters = max(2, min(n_clusters, len(self) // _FRAMES_PER_CLUSTER))
        fitted = fit_kmeans(frames_ND, KmeansOptions(n_clusters, max_iter=_MAX_ITER, seed=seed))
        unit_N = assign(frames_ND, fitted.centroids_KD).numpy()
        counts_PK = joint_counts(self.phone_N, unit_N, len(self.phones), n_clusters)
        return {"n_units": n_clusters, **cluster_quality(counts_PK)}
