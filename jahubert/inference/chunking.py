"""Recordings of any length through an encoder: in batches, and in overlapping chunks where they are long.

A chunk starts on a frame, and the frames of neighbours are joined in the middle of their overlap: every frame
of the recording comes once, at its place. What a chunk cannot see is what lies further away than half an
overlap from its frames; docs/frames.md says how much that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE, FrameGrid

OVERLAP_SECONDS = 4.0  # of two chunks of a long recording; each half of it is context that is thrown away
BATCH_SECONDS = 120.0  # of padded audio that goes through the encoder at once

# Encodes a padded batch: (wav_BT, n_samples) -> (frames (B, S, ...), n_frames_B).
Encode = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Chunk:
    """A stretch of a recording, which starts on a frame; of its frames, `[keep, end)` count."""

    wav_T: Tensor
    start: int  # sample of the recording
    keep: int  # those before are the previous chunk's
    end: int


def chunk_size(grid: FrameGrid, seconds: float) -> tuple[int, int]:
    """Samples of a chunk, and of what it has in common with the next."""
    overlap = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE))
    chunk = grid.floor(round(seconds * SAMPLE_RATE))
    if chunk < 2 * overlap:
        raise ConfigError(
            f"chunks of {seconds} s are too short: they overlap by {OVERLAP_SECONDS} s; take 8 or more"
        )
    return chunk, overlap


def chunks(blocks: Iterable[Tensor], grid: FrameGrid, seconds: float | None) -> Iterator[Chunk]:
    """Overlapping chunks of a recording that comes in blocks (T,); one of everything if `seconds` is None."""
    held, start, keep = torch.zeros(0), 0, 0
    if seconds is None:
        held = torch.cat([held, *blocks])
    else:
        length, overlap = chunk_size(grid, seconds)
        step, half = length - overlap, overlap // grid.hop // 2
        for block in blocks:
            held = torch.cat([held, block])
            while len(held) > length:
                yield Chunk(held[:length], start, keep, step // grid.hop + half)
                held, start, keep = held[step:], start + step, half
    yield Chunk(held, start, keep, int(grid.n_frames(len(held))))


def encode_all(
    wavs: Sequence[Tensor],
    encode: Encode,
    grid: FrameGrid,
    shape: Sequence[int],
    chunk_seconds: float | None,
) -> list[Tensor]:
    """Frames (S, *shape) of each waveform, on the CPU; long ones in chunks.

    A waveform that is shorter than one frame has no frames.
    """
    cut = [list(chunks([wav], grid, chunk_seconds)) for wav in wavs]
    places = [(i, j) for i, own in enumerate(cut) for j, chunk in enumerate(own) if chunk.end > chunk.keep]
    places.sort(key=lambda place: -len(cut[place[0]][place[1]].wav_T))
    parts = [[torch.zeros(0, *shape)] * len(own) for own in cut]
    for batch in _batches(places, [len(cut[i][j].wav_T) for i, j in places]):
        found = _encoded([cut[i][j] for i, j in batch], encode)
        for (i, j), frames in zip(batch, found, strict=True):
            parts[i][j] = frames
    return [torch.cat(own) for own in parts]


def encode_stream(
    blocks: Iterable[Tensor], encode: Encode, grid: FrameGrid, chunk_seconds: float
) -> Iterator[Tensor]:
    """Frames (S, ...) of one waveform that comes in blocks (T,), chunk by chunk, on the CPU.

    Laid end to end they are those of `encode_all`; memory is that of one chunk. Nothing comes of a waveform
    that is shorter than one frame.
    """
    for chunk in chunks(blocks, grid, chunk_seconds):
        if chunk.end > chunk.keep:
            yield from _encoded([chunk], encode)


def _encoded(batch: list[Chunk], encode: Encode) -> list[Tensor]:
    """The frames of each chunk that count, on the CPU."""
    lengths = [len(chunk.wav_T) for chunk in batch]
    wav_BT = torch.zeros(len(batch), max(lengths))
    for row, chunk in zip(wav_BT, batch, strict=True):
        row[: len(chunk.wav_T)] = chunk.wav_T
    with torch.inference_mode():
        frames = encode(wav_BT, lengths)[0].cpu()
    return [row[chunk.keep : chunk.end].clone() for row, chunk in zip(frames, batch, strict=True)]


def _batches(places: list[tuple[int, int]], lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Places in their order, longest first, gathered while their padded length fits."""
    batch: list[tuple[int, int]] = []
    longest = 0
    for place, length in zip(places, lengths, strict=True):
        if batch and (len(batch) + 1) * longest > BATCH_SECONDS * SAMPLE_RATE:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(place)
    if batch:
        yield batch
