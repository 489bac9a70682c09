"""Batches for pretraining and CTC fine-tuning, built from a manifest and its labels or targets.

Crops, masks and augmentation are determined by (seed, epoch, row). They depend neither on the other
utterances in a batch nor on interruptions of the run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.inference.ctc import frames_needed
from jahubert.model.kernels import PackedShape
from jahubert.train.data.augmentation import AugmentConfig, Augmenter
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.data.sampler import BatchSizes, MicroBatch, Sampler
from jahubert.train.data.targets import TargetStore
from jahubert.train.experiment.config import raise_config_errors, range_errors, runtime_field

log = logging.getLogger(__name__)

B = TypeVar("B", bound="_Batch")


@dataclass(frozen=True)
class MaskConfig:
    """Span masks over frames and channels.

    The defaults are those of HuBERT pretraining; the finetune stage has its own.
    """

    prob: float = 0.8  # fraction of frames that would be masked if spans did not overlap
    length: int = 10  # length of a span (frames)
    min_spans: int = 2  # minimum number of spans per utterance, if they fit
    channel_prob: float = 0.0  # fraction of channels that would be masked if spans did not overlap
    channel_length: int = 64  # length of a span (channels)

    def __post_init__(self) -> None:
        shares, lengths = ("prob", "channel_prob"), ("length", "channel_length")
        raise_config_errors(
            range_errors(self, {"in [0, 1)": shares, "at least 1": lengths, "at least 0": ("min_spans",)})
        )


@dataclass
class _Batch:
    wav_BT: Tensor  # float32, zero-padded
    n_samples_B: Tensor  # int64, on the CPU

    ON_CPU: ClassVar[tuple[str, ...]] = ("n_samples_B", "n_target_B")  # tensors that `to` does not move

    def to(self: B, device: torch.device) -> B:
        """Return a copy whose large tensors are on `device`. Lengths stay on the CPU, where they are used."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """Return a copy in pinned memory (for DataLoader), from which `to` copies without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self: B, change: Callable[[Tensor], Tensor]) -> B:
        """Return a copy with `change` applied to all tensors except those in `ON_CPU`.

        The copy is created without calling `__post_init__`, whose checks would synchronize the GPU.
        """
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in self.ON_CPU:
                setattr(other, name, change(value))
        return other

    @property
    def seconds(self) -> float:
        return self.n_samples_B.sum().item() / SAMPLE_RATE


@dataclass
class PretrainBatch(_Batch):
    """Pretraining batch: waveforms, frame masks, and the units of the masked frames."""

    mask_BS: Tensor  # bool
    unit_N: Tensor  # int64, units of the masked frames, in row-major order
    # Weight of the feature penalty of each utterance, as a number of targets: the number of masked frames in
    # the utterance's group of the sampler, times the utterance's fraction of the frames in the group. The
    # penalty of a group is then the same, no matter how groups are cut or merged.
    penalty_count_B: Tensor | None = None  # float32; None: the batch is one group
    shape: PackedShape | None = None  # shape that is passed to the model
    masked_index_N: Tensor = field(init=False)  # int64, indices of the masked frames in the flattened mask

    def __post_init__(self) -> None:
        self.masked_index_N = self.mask_BS.flatten().nonzero()[:, 0]
        if len(self.masked_index_N) != len(self.unit_N):
            raise DataError(
                f"expected one unit per masked frame ({len(self.masked_index_N)}), found {len(self.unit_N)}"
            )
        if self.penalty_count_B is None:
            n_frames_B = HUBERT.n_frames(self.n_samples_B)
            self.penalty_count_B = len(self.unit_N) * n_frames_B / n_frames_B.sum()


@dataclass
class CtcBatch(_Batch):
    """Fine-tuning batch: waveforms, frame and channel masks, and the concatenated target symbols."""

    mask_BS: Tensor | None
    channel_mask_BD: Tensor | None
    target_L: Tensor  # int64
    n_target_B: Tensor  # int64, on the CPU
    shape: PackedShape | None = None  # shape that is passed to the model

    def __post_init__(self) -> None:
        if int(self.n_target_B.sum()) != len(self.target_L):
            raise DataError(
                f"target_L has length {len(self.target_L)}, but n_target_B adds up to "
                f"{int(self.n_target_B.sum())}"
            )


def pad(rows: list[Tensor]) -> Tensor:
    """Stack rows of different lengths into one tensor (B, max length), padded with 0 or False."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class CropConfig:
    """Length limits and caching of pretraining utterances; the limits are those of fairseq's HuBERT BASE."""

    min_seconds: float = 2.0  # shorter utterances are skipped
    max_seconds: float = 15.625  # longer utterances are cropped at random frame positions
    # If a split has at most this many hours of audio, each data worker keeps decoded audio in memory (0.23 GB
    # per hour). A larger split is not cached at all.
    keep_in_memory_hours: float = runtime_field(4.0)

    def __post_init__(self) -> None:
        errors = range_errors(self, {"at least 0": ("min_seconds", "keep_in_memory_hours")})
        if not HUBERT.n_frames(self.max_samples) or self.min_seconds > self.max_seconds:
            errors.append(
                f"max_seconds is {self.max_seconds}, but must be at least min_seconds ({self.min_seconds}) "
                "and contain a frame (at least 0.04)"
            )
        raise_config_errors(errors)

    @property
    def max_samples(self) -> int:
        """Length of the longest crop in samples, a multiple of the hop length."""
        return HUBERT.floor(round(min(self.max_seconds, 1e9) * SAMPLE_RATE))


class WaveformCache:
    """In-memory cache of decoded utterances, enabled if `rows` contain at most `max_hours` of audio."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, max_hours: float):
        self.manifest = manifest
        self.enabled = manifest.n_samples[rows].sum() <= max_hours * 3600 * SAMPLE_RATE
        self.waveforms: dict[int, np.ndarray] = {}

    def load(self, row: int, start: int, n_samples: int) -> Tensor:
        """Load `n_samples` samples of an utterance from sample `start` on, float32 (T,)."""
        if not self.enabled:
            return self.manifest.load(row, start, n_samples)
        if row not in self.waveforms:
            self.waveforms[row] = self.manifest.load(row).numpy()
        return torch.from_numpy(self.waveforms[row][start : start + n_samples])


def _augmenter(
    config: AugmentConfig | None,
    seed: int,
    rows: np.ndarray,
    cache: WaveformCache,
    targets: TargetStore | None = None,
) -> Augmenter | None:
    """Create the augmenter of a data set, or return None if all effects are disabled.

    If `targets` is given, changes of speed leave each of `rows` as many frames as CTC needs for its target.
    """
    if config is None or not config.enabled:
        return None
    n_samples, min_samples = cache.manifest.n_samples, None
    if targets is not None and config.speed_prob:
        min_samples = np.full(len(n_samples), HUBERT.n_samples(1))
        for row in rows:
            min_samples[row] = HUBERT.n_samples(frames_needed(targets[row].tolist()))
    return Augmenter(config, seed, rows, n_samples, cache.load, min_samples)


def _long_enough(manifest: Manifest, split: str, min_seconds: float) -> np.ndarray:
    """Return the rows of a split that are long enough for pretraining, and log how many are not.

    Raises:
        DataError: the split has utterances, but none is long enough.
    """
    rows = manifest.indices(split=split)
    n_samples = manifest.n_samples[rows]
    keep = n_samples >= max(min_seconds * SAMPLE_RATE, HUBERT.n_samples(1))
    if len(rows) and not keep.any():
        raise DataError(
            f"pretrain.crop.min_seconds is {min_seconds:g}, but the longest utterance of split {split} lasts "
            f"{n_samples.max() / SAMPLE_RATE:.2f} s; set a smaller value or use longer recordings"
        )
    if not keep.all():
        log.log(
            logging.WARNING if keep.mean() < 0.5 else logging.INFO,
            "pretraining on %s: utterances skipped as shorter than crop.min_seconds=%g: %d of %d",
            split,
            min_seconds,
            len(rows) - keep.sum(),
            len(rows),
        )
    kept: np.ndarray = rows[keep]
    return kept


class PretrainData:
    """Micro-batches of cropped utterances from one split, for masked unit prediction."""

    def __init__(
        self,
        manifest: Manifest,
        labels: LabelStore,
        *,
        split: str,
        crop: CropConfig,
        mask: MaskConfig,
        sizes: BatchSizes,
        seed: int,
        augment: AugmentConfig | None = None,
    ):
        labels.check(manifest)
        self.manifest, self.labels, self.mask, self.seed = manifest, labels, mask, seed
        self.max_samples = crop.max_samples
        rows = _long_enough(manifest, split, crop.min_seconds)
        n_samples = manifest.n_samples[rows]
        self.cache = WaveformCache(manifest, rows, crop.keep_in_memory_hours)
        self.augmenter = _augmenter(augment, seed, rows, self.cache)
        self.sampler = Sampler(rows, np.minimum(n_samples, self.max_samples), sizes, seed=seed)

    def name(self, row: int) -> str:
        return self.manifest[row].id

    def load(self, micro: MicroBatch) -> PretrainBatch:
        wavs, masks, units = [], [], []
        for row in micro.rows:
            length, first, mask_S = self._draw(micro.epoch, row)
            unit_S = self.labels.units(row, HUBERT.n_frames(length))
            wav_T = self.cache.load(row, HUBERT.start(first), min(length, self.max_samples))
            wavs.append(wav_T if self.augmenter is None else self.augmenter(wav_T, micro.epoch, row))
            units.append(np.asarray(unit_S[first : first + len(mask_S)])[mask_S].astype(np.int64))
            masks.append(torch.from_numpy(mask_S))
        return PretrainBatch(
            wav_BT=pad(wavs),
            n_samples_B=torch.tensor([len(wav) for wav in wavs]),
            mask_BS=pad(masks),
            unit_N=torch.from_numpy(np.concatenate(units)),
            penalty_count_B=None if micro.groups is None else self._penalty_counts(micro, masks),
            shape=self.sampler.shape,
        )

    def _draw(self, epoch: int, row: int) -> tuple[int, int, np.ndarray]:
        """Draw a crop. Return the length (samples) of the utterance, the first frame, and the mask (S,)."""
        rng = seeded_rng(self.seed, epoch, row, 1)
        length = int(self.manifest.n_samples[row])
        n_samples = min(length, self.max_samples)
        # Crops start at a frame boundary, so that labels stay aligned.
        first = int(rng.integers((length - n_samples) // HUBERT.hop + 1))
        n_frames = HUBERT.n_frames(n_samples)
        return length, first, span_mask(n_frames, self.mask.prob, self.mask.length, rng, self.mask.min_spans)

    def _penalty_counts(self, micro: MicroBatch, masks: list[Tensor]) -> Tensor:
        drawn = {row: mask_S.numpy() for row, mask_S in zip(micro.rows, masks, strict=True)}
        counts = {}
        for rows in micro.groups or ():
            group = {row: drawn[row] if row in drawn else self._draw(micro.epoch, row)[2] for row in rows}
            masked = np.concatenate(list(group.values())).mean()  # fraction of the frames
            counts.update({row: masked * len(mask_S) for row, mask_S in group.items()})
        return torch.tensor([counts[row] for row in micro.rows], dtype=torch.float32)


class CtcData:
    """Micro-batches of whole utterances with their target symbols, for CTC fine-tuning."""

    def __init__(
        self,
        manifest: Manifest,
        targets: TargetStore,
        rows: np.ndarray,
        *,
        mask: MaskConfig | None,
        width: int,
        sizes: BatchSizes,
        seed: int,
        keep_in_memory_hours: float,
        augment: AugmentConfig | None = None,
    ):
        """Create a data source.

        Args:
            mask: None disables masking.
            width: number of encoder channels, for the channel mask.
        """
        self.manifest, self.targets, self.mask, self.width, self.seed = manifest, targets, mask, width, seed
        self.cache = WaveformCache(manifest, rows, keep_in_memory_hours)
        self.augmenter = augmenter = _augmenter(augment, seed, rows, self.cache, targets)
        shortest = longest = manifest.n_samples[rows]
        if augmenter is not None:
            shortest, longest = augmenter.length_bounds(rows)
        self.sampler = Sampler(
            rows,
            longest,
            sizes,
            seed=seed,
            shortest=shortest,
            epoch_lengths=None if augmenter is None else partial(augmenter.lengths, rows=rows),
        )

    def name(self, row: int) -> str:
        return self.manifest[row].id

    def load(self, micro: MicroBatch) -> CtcBatch:
        wavs, masks, channels, targets = [], [], [], []
        for row in micro.rows:
            wav_T = self.cache.load(row, 0, int(self.manifest.n_samples[row]))
            wavs.append(wav_T if self.augmenter is None else self.augmenter(wav_T, micro.epoch, row))
            targets.append(torch.from_numpy(self.targets[row].astype(np.int64)))
            if self.mask is None:
                continue
            rng = seeded_rng(self.seed, micro.epoch, row, 2)
            n_frames = HUBERT.n_frames(len(wavs[-1]))
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
            shape=self.sampler.shape,
        )
