"""Batches of both trainings: built from a manifest and its labels or targets, checked, moved to a device.

Every random choice (crop, mask) is a function of (seed, epoch, row), so an utterance meets the same fate
whatever it is batched with and however often the run was killed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.data.targets import TargetStore
from jahubert.train.experiment.config import raise_config_errors, range_errors, runtime_field

B = TypeVar("B", bound="_Batch")


@dataclass(frozen=True)
class MaskConfig:
    """Span masks over frames and channels; the defaults are HuBERT pretraining."""

    prob: float = 0.8  # expected share of positions inside spans, before overlap
    length: int = 10  # frames
    min_spans: int = 2
    channel_prob: float = 0.0
    channel_length: int = 64  # channels

    def __post_init__(self) -> None:
        shares, lengths = ("prob", "channel_prob"), ("length", "channel_length")
        raise_config_errors(
            range_errors(self, {"in [0, 1)": shares, "at least 1": lengths, "at least 0": ("min_spans",)})
        )


@dataclass(frozen=True)
class _Batch:
    wav_BT: Tensor  # float32, zero behind each utterance
    n_samples_B: Tensor  # int64, on the CPU

    def to(self: B, device: torch.device) -> B:
        """The batch with its large tensors on `device`; lengths stay on the CPU, where they are read."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """For a DataLoader: from page-locked memory `to` copies while the GPU is still at the last batch."""
        return self._with(Tensor.pin_memory)

    def _with(self: B, change: Callable[[Tensor], Tensor]) -> B:
        """A copy with other large tensors; it is not checked again, for which a GPU would have to finish."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and not name.startswith("n_"):
                vars(other)[name] = change(value)
        return other

    @property
    def seconds(self) -> float:
        return self.n_samples_B.sum().item() / SAMPLE_RATE


@dataclass(frozen=True)
class PretrainBatch(_Batch):
    """Waveforms, which of their frames are masked, and the units of those frames."""

    mask_BS: Tensor  # bool
    unit_N: Tensor  # int64, units of the masked frames, row by row
    masked_index_N: Tensor = field(init=False)  # int64, where these frames are among all of the padded batch

    def __post_init__(self) -> None:
        vars(self)["masked_index_N"] = self.mask_BS.flatten().nonzero()[:, 0]
        if len(self.masked_index_N) != len(self.unit_N):
            raise DataError(f"{len(self.masked_index_N)} masked frames, but {len(self.unit_N)} units")


@dataclass(frozen=True)
class CtcBatch(_Batch):
    """Waveforms, masks over frames and channels, and the target symbols of each utterance end to end."""

    mask_BS: Tensor | None
    channel_mask_BD: Tensor | None
    target_L: Tensor  # int64
    n_target_B: Tensor  # int64, on the CPU

    def __post_init__(self) -> None:
        if int(self.n_target_B.sum()) != len(self.target_L):
            raise DataError(
                f"{len(self.target_L)} target symbols, but their lengths sum to {int(self.n_target_B.sum())}"
            )


def pad(rows: list[Tensor]) -> Tensor:
    """Rows of different lengths as one (B, longest) tensor, zero (or False) behind each."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class CropConfig:
    """Which utterances are learnt from, and how much of a long one; defaults are the paper's."""

    min_seconds: float = 2.0  # shorter ones are left out
    max_seconds: float = 15.625  # longer ones are cropped, at random, on the frame grid
    # A split of no more hours stays decoded in the memory of each reader (0.23 GB an hour); of a larger one
    # nothing does, since a part would save next to no decoding.
    keep_in_memory_hours: float = runtime_field(4.0)

    def __post_init__(self) -> None:
        wrong = range_errors(self, {"at least 0": ("min_seconds", "keep_in_memory_hours")})
        if not HUBERT.n_samples(1) / SAMPLE_RATE <= self.max_seconds or self.min_seconds > self.max_seconds:
            wrong.append(
                f"max_seconds must be a frame (0.025) at least, and min_seconds no more; found "
                f"{self.max_seconds} and {self.min_seconds}"
            )
        raise_config_errors(wrong)


class WaveformCache:
    """Waveforms of some rows of a manifest, kept after the first reading if all are `hours` at most."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, hours: float):
        self.manifest = manifest
        self.keeps = manifest.n_samples[rows].sum() <= hours * 3600 * SAMPLE_RATE
        self.kept: dict[int, np.ndarray] = {}

    def load(self, row: int, start: int, n_samples: int) -> Tensor:
        """`n_samples` samples of an utterance from its sample `start` on."""
        if not self.keeps:
            return self.manifest.load(row, start, n_samples)
        if row not in self.kept:
            self.kept[row] = self.manifest.load(row).numpy()
        return torch.from_numpy(self.kept[row][start : start + n_samples])


class PretrainData:
    """Micro-batches for masked prediction over one split."""

    def __init__(
        self,
        manifest: Manifest,
        labels: LabelStore,
        *,
        split: str,
        crop: CropConfig,
        mask: MaskConfig,
        micro_seconds: float,
        micro_batches_per_step: int,
        seed: int,
    ):
        labels.check(manifest)
        self.manifest, self.labels, self.mask, self.seed = manifest, labels, mask, seed
        self.longest = HUBERT.floor(int(crop.max_seconds * SAMPLE_RATE))
        rows = manifest.indices(split=split)
        length = manifest.n_samples[rows]
        keep = length >= max(crop.min_seconds * SAMPLE_RATE, HUBERT.n_samples(1))
        rows, length = rows[keep], length[keep]
        self.waves = WaveformCache(manifest, rows, crop.keep_in_memory_hours)
        self.sampler = Sampler(
            rows,
            np.minimum(length, self.longest),
            micro_seconds=micro_seconds,
            micro_batches_per_step=micro_batches_per_step,
            seed=seed,
        )

    def name(self, row: int) -> str:
        return self.manifest[row].id

    def load(self, micro: MicroBatch) -> PretrainBatch:
        wavs, masks, units = [], [], []
        for row in micro.rows:
            rng = seeded_rng(self.seed, micro.epoch, row, 1)
            length = int(self.manifest.n_samples[row])
            n_samples = min(length, self.longest)
            first = int(rng.integers((length - n_samples) // HUBERT.hop + 1))  # in frames: labels stay exact
            track_S = self.labels.units(row, HUBERT.n_frames(length))
            n_frames = HUBERT.n_frames(n_samples)
            mask_S = span_mask(n_frames, self.mask.prob, self.mask.length, rng, self.mask.min_spans)
            wavs.append(self.waves.load(row, HUBERT.start(first), n_samples))
            units.append(np.asarray(track_S[first : first + n_frames])[mask_S].astype(np.int64))
            masks.append(torch.from_numpy(mask_S))
        return PretrainBatch(
            wav_BT=pad(wavs),
            n_samples_B=torch.tensor([len(wav) for wav in wavs]),
            mask_BS=pad(masks),
            unit_N=torch.from_numpy(np.concatenate(units)),
        )


class CtcData:
    """Micro-batches of whole utterances and their target symbols: padded, never cropped."""

    def __init__(
        self,
        manifest: Manifest,
        targets: TargetStore,
        rows: np.ndarray,
        *,
        mask: MaskConfig | None,
        width: int,
        micro_seconds: float,
        micro_batches_per_step: int,
        seed: int,
        keep_in_memory_hours: float = 4.0,
    ):
        """`width`: channels of the encoder, for the channel mask; `mask=None`: nothing is masked."""
        self.manifest, self.targets, self.mask, self.width, self.seed = manifest, targets, mask, width, seed
        self.waves = WaveformCache(manifest, rows, keep_in_memory_hours)
        self.sampler = Sampler(
            rows,
            manifest.n_samples[rows],
            micro_seconds=micro_seconds,
            micro_batches_per_step=micro_batches_per_step,
            seed=seed,
        )

    def name(self, row: int) -> str:
        return self.manifest[row].id

    def load(self, micro: MicroBatch) -> CtcBatch:
        wavs, masks, channels, targets = [], [], [], []
        for row in micro.rows:
            n_samples = int(self.manifest.n_samples[row])
            wavs.append(self.waves.load(row, 0, n_samples))
            targets.append(torch.from_numpy(self.targets[row].astype(np.int64)))
            if self.mask is None:
                continue
            rng = seeded_rng(self.seed, micro.epoch, row, 2)
            n_frames = HUBERT.n_frames(n_samples)
            frames = span_mask(n_frames, self.mask.prob, self.mask.length, rng, self.mask.min_spans)
            masks.append(torch.from_numpy(frames))
            channels.append(
                torch.from_numpy(span_mask(self.width, self.mask.channel_prob, self.mask.channel_length, rng))
            )
        return CtcBatch(
            wav_BT=pad(wavs),
            n_samples_B=torch.tensor([len(wav) for wav in wavs]),
            mask_BS=pad(masks) if masks else None,
            channel_mask_BD=torch.stack(channels) if channels else None,
            target_L=torch.cat(targets),
            n_target_B=torch.tensor([len(target) for target in targets]),
        )
