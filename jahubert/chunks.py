"""Recordings of any length through an encoder: in batches, and in overlapping chunks where they are long.

A chunk starts on a frame, and the frames of neighbours are joined in the middle of their overlap: every frame
of the recording comes once, at its place. What a chunk cannot see is what lies further away than half an
overlap from its frames; docs/frames.md says how much that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE, FrameGrid

OVERLAP_SECONDS = 4.0  # of two chunks of a long recording; each half of it is context that is thrown away
BATCH_SECONDS = 120.0  # of padded audio that goes through the encoder at once

# Encodes a padded batch: (wav_BT, n_samples) -> (frames (B, S, ...), n_frames_B).
Encode = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]


def chunk_size(grid: FrameGrid, seconds: float) -> tuple[int, int]:
    """Samples of a chunk, and of what it has in common with the next."""
    overlap = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE))
    chunk = grid.floor(round(seconds * SAMPLE_RATE))
    if chunk < 2 * overlap:
        raise ConfigError(
            f"chunks of {seconds} s are too short: they overlap by {OVERLAP_SECONDS} s; take 8 or more"
        )
    return chunk, overlap


def chunk_starts(n_samples: int, grid: FrameGrid, seconds: float | None) -> list[tuple[int, int]]:
    """Cut a recording into (start, samples), overlapping, each starting on a frame."""
    if seconds is None:
        return [(0, n_samples)]
    chunk, overlap = chunk_size(grid, seconds)
    chunks, start = [], 0
    while start + chunk < n_samples:
        chunks.append((start, chunk))
        start += chunk - overlap
    return [*chunks, (start, n_samples - start)]


def kept_frames(number: int, step: int | None, grid: FrameGrid) -> slice:
    """The frames of chunk `number` that are taken; `step` samples later the next one starts, if one does."""
    half = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE)) // grid.hop // 2
    # The next chunk takes over `half` frames behind its own start.
    return slice(half if number else 0, None if step is None else step // grid.hop + half)


def encode_all(
    wavs: Sequence[Tensor],
    encode: Encode,
    grid: FrameGrid,
    shape: Sequence[int],
    chunk_seconds: float | None,
) -> list[Tensor]:
    """Frames (S, *shape) of each waveform, on the CPU; long ones in chunks, joined in the middle of overlaps.

    A waveform that is shorter than one frame has no frames.
    """
    cut = [chunk_starts(len(wav), grid, chunk_seconds) for wav in wavs]
    chunks = [
        (index, number, n)
        for index, own in enumerate(cut)
        for number, (_, n) in enumerate(own)
        if grid.n_frames(n)
    ]
    parts: dict[tuple[int, int], Tensor] = {}
    for batch in _batches(sorted(chunks, key=lambda chunk: -chunk[2])):
        lengths = [n for _, _, n in batch]
        wav_BT = torch.zeros(len(batch), lengths[0])
        for row, (index, number, n) in zip(wav_BT, batch, strict=True):
            start = cut[index][number][0]
            row[:n] = wavs[index][start : start + n]
        found = _encoded(encode, wav_BT, lengths)
        for frames, (index, number, _) in zip(found, batch, strict=True):
            own = cut[index]
            step = own[number + 1][0] - own[number][0] if number + 1 < len(own) else None
            parts[index, number] = frames[kept_frames(number, step, grid)].clone()
    empty = torch.zeros(0, *shape)
    return [
        torch.cat([parts.get((index, number), empty) for number in range(len(own))])
        for index, own in enumerate(cut)
    ]


def encode_stream(
    blocks: Iterable[Tensor], encode: Encode, grid: FrameGrid, chunk_seconds: float
) -> Iterator[Tensor]:
    """Frames (S, ...) of one waveform that comes in blocks (T,), chunk by chunk, on the CPU.

    Laid end to end they are those of `encode_all`; memory is that of one chunk. Nothing comes of a waveform
    that is shorter than one frame.
    """
    chunk, overlap = chunk_size(grid, chunk_seconds)
    step, number, waiting = chunk - overlap, 0, torch.zeros(0)
    for block in blocks:
        waiting = torch.cat([waiting, block])
        while len(waiting) > chunk:
            (frames,) = _encoded(encode, waiting[None, :chunk], [chunk])
            yield frames[kept_frames(number, step, grid)]
            waiting, number = waiting[step:].clone(), number + 1
    if grid.n_frames(len(waiting)):
        (frames,) = _encoded(encode, waiting[None], [len(waiting)])
        yield frames[kept_frames(number, None, grid)]


def _encoded(encode: Encode, wav_BT: Tensor, lengths: list[int]) -> list[Tensor]:
    """The valid frames of each row, on the CPU."""
    with torch.inference_mode():
        frames, n_frames_B = encode(wav_BT, lengths)
        frames = frames.cpu()
    return [row[: int(n)] for row, n in zip(frames, n_frames_B, strict=True)]


def _batches(chunks: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Chunks, longest first, gathered while their padded length fits."""
    batch: list[tuple[int, int, int]] = []
    for chunk in chunks:
        if batch and (len(batch) + 1) * batch[0][2] > BATCH_SECONDS * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
