"""Batched encoding of recordings of any length, in which long recordings are split into overlapping chunks.

Chunks start on frame boundaries and are joined in the middle of their overlap, so that every frame is
returned exactly once. A frame at a joint has only half an overlap of context on one side. docs/frames.md
describes the effects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from jahubert.errors import AudioError, ConfigError
from jahubert.frames import SAMPLE_RATE, FrameGrid

T = TypeVar("T")

OVERLAP_SECONDS = 4.0  # overlap of neighboring chunks, of which each chunk keeps half
BATCH_SECONDS = 120.0  # maximum total length of a batch of several chunks, including padding

# Function that encodes a padded batch: (wav_BT, n_samples) -> (frames (B, S, ...), n_frames_B).
Encode = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Part of a recording, starting on a frame boundary. Of its frames, `[keep, end)` are kept."""

    wav_T: Tensor
    start: int  # first sample, within the recording
    keep: int  # first frame that is kept; the previous chunk provides earlier frames
    end: int  # end of the frames that are kept


def chunk_size(grid: FrameGrid, seconds: float) -> tuple[int, int]:
    """Return the length of a chunk and the overlap between chunks, in samples.

    Raises:
        ConfigError: `seconds` is not a finite number, or a chunk is shorter than two overlaps.
    """
    if not math.isfinite(seconds):
        raise ConfigError(f"the length of chunks must be a finite number of seconds, but is {seconds}")
    overlap = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE))
    chunk = grid.floor(round(seconds * SAMPLE_RATE))
    if chunk < 2 * overlap:
        raise ConfigError(
            f"chunks of {seconds} s are too short for an overlap of {OVERLAP_SECONDS} s; use at least "
            f"{2 * OVERLAP_SECONDS:.0f} s"
        )
    return chunk, overlap


def chunks(blocks: Iterable[Tensor], grid: FrameGrid, seconds: float | None) -> Iterator[Chunk]:
    """Split the blocks (T,) of a recording into overlapping chunks, or join them if `seconds` is None."""
    start, keep = 0, 0
    buffer = torch.zeros(0, dtype=torch.float32, device="cpu")
    if seconds is None:
        buffer = torch.cat([buffer, *blocks])
    else:
        length, overlap = chunk_size(grid, seconds)
        step = length - overlap
        half = overlap // grid.hop // 2
        for block in blocks:
            buffer = torch.cat([buffer, block])
            while len(buffer) > length:
                yield Chunk(buffer[:length], start, keep, step // grid.hop + half)
                buffer = buffer[step:]
                start += step
                keep = half
    yield Chunk(buffer, start, keep, int(grid.n_frames(len(buffer))))


def encode_all(
    wavs: Sequence[Tensor],
    encode: Encode,
    grid: FrameGrid,
    shape: Sequence[int],
    chunk_seconds: float | None,
    *,
    one_by_one: bool = False,
) -> list[Tensor]:
    """Encode waveforms in batches of similar length, splitting long waveforms into chunks.

    Args:
        wavs: 16 kHz waveforms (T,), floating-point and finite.
        shape: shape of one frame.
        chunk_seconds: length of the chunks. With None, every waveform is encoded as a whole.
        one_by_one: whether to encode every chunk on its own instead of in batches.

    Returns:
        Frames (S, *shape) of each waveform, on the CPU. S is 0 for audio shorter than one frame.

    Raises:
        AudioError: an item is not a floating-point tensor (T,), or has NaN or infinite samples.
    """
    checked = [_checked_waveform(wav, i) for i, wav in enumerate(wavs)]
    chunks_of = [list(chunks([wav], grid, chunk_seconds)) for wav in checked]
    parts = [[torch.zeros(0, *shape, dtype=torch.float32, device="cpu")] * len(own) for own in chunks_of]
    # The (waveform, chunk) pairs are sorted by descending chunk length to reduce padding.
    pairs = [
        (i, j) for i, own in enumerate(chunks_of) for j, chunk in enumerate(own) if chunk.end > chunk.keep
    ]
    pairs.sort(key=lambda pair: -len(chunks_of[pair[0]][pair[1]].wav_T))
    lengths = [len(chunks_of[i][j].wav_T) for i, j in pairs]
    for batch in batched(pairs, 1) if one_by_one else _batches(pairs, lengths):
        encoded = _encode_batch([chunks_of[i][j] for i, j in batch], encode)
        for (i, j), frames in zip(batch, encoded, strict=True):
            parts[i][j] = frames
    return [torch.cat(own) for own in parts]


def encode_stream(
    blocks: Iterable[Tensor], encode: Encode, grid: FrameGrid, chunk_seconds: float
) -> Iterator[Tensor]:
    """Encode the blocks (T,) of one waveform chunk by chunk, and yield frames (S, ...) on the CPU.

    The concatenated frames equal the result of `encode_all` with the same chunks, up to rounding. Only one
    chunk and one block are in memory at a time. Nothing is yielded for audio shorter than one frame.
    """
    for chunk in chunks(blocks, grid, chunk_seconds):
        if chunk.end > chunk.keep:
            yield from _encode_batch([chunk], encode)


def batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Yield lists of up to `n` items, like `itertools.batched` in Python 3.12."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield batch
            batch = []
    if batch:
        yield batch


def _checked_waveform(wav_T: object, i: int) -> Tensor:
    """Check item `i` of a list of waveforms, and return it on the CPU without its gradient graph."""
    if not isinstance(wav_T, Tensor) or wav_T.dim() != 1 or not wav_T.is_floating_point():
        found = f"of type {type(wav_T).__name__}"
        if isinstance(wav_T, Tensor):
            found = f"a tensor of shape {tuple(wav_T.shape)} and type {wav_T.dtype}"
        raise AudioError(
            f"waveform {i} of the list is {found}, but must be a floating-point tensor (T,) at 16 kHz; "
            "convert it with load_audio"
        )
    if not wav_T.isfinite().all():
        raise AudioError(f"waveform {i} of the list contains a NaN or infinite value; remove it first")
    return wav_T.detach().cpu()


def _encode_batch(batch: list[Chunk], encode: Encode) -> list[Tensor]:
    """Encode a batch of chunks, and return the kept frames of each chunk on the CPU."""
    lengths = [len(chunk.wav_T) for chunk in batch]
    wav_BT = torch.zeros(len(batch), max(lengths), dtype=torch.float32, device="cpu")
    for row, chunk in zip(wav_BT, batch, strict=True):
        row[: len(chunk.wav_T)] = chunk.wav_T
    with torch.inference_mode():
        frames = encode(wav_BT, lengths)[0].cpu()
    return [row[chunk.keep : chunk.end].clone() for row, chunk in zip(frames, batch, strict=True)]


def _batches(pairs: list[tuple[int, int]], lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Group pairs, sorted by descending length, into batches of one chunk or of up to `BATCH_SECONDS`."""
    batch: list[tuple[int, int]] = []
    longest = 0
    for pair, length in zip(pairs, lengths, strict=True):
        if batch and (len(batch) + 1) * longest > BATCH_SECONDS * SAMPLE_RATE:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(pair)
    if batch:
        yield batch
