"""Long recordings in bounded memory: where somebody speaks, and where to cut for decoding.

A CTC model that has only seen speech finds phones in silence, noise and music as well. What tells speech
from them: it is louder than -60 dB, its level moves by several dB within a second (that of noise does not),
and so does its spectrum from one 40 ms to the next (that of tones does not).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frames import FrameGrid

T = TypeVar("T")

CHUNK_SECONDS = 30.0  # longer recordings are encoded in overlapping chunks of this length
AT_ONCE = 4  # chunks in one pass of the model
PAUSE_SECONDS = 0.5  # of blanks around the place where a long recording is cut for decoding

# Voice activity, in frames of 20 ms; measured on words, sentences, noise and tones (LOG.md).
_WINDOW, _STEP = 64, 16  # frames over which level and spectrum are watched
_FLOOR_DB = -60.0  # below full scale
_BELOW_DB = 30.0  # quieter than the loudest frame of the window by this: not active
_FEWEST = 4  # active frames of a window that has speech
_LEVEL_DB, _CHANGE_DB = 2.5, 2.6  # standard deviation of the level; median change of the spectrum
_LAG = 2  # frames between two spectra
_AROUND = 12  # frames around speech that are kept: quiet consonants, and room for CTC's spikes
_QUIET = 1e-10


def merge_spans(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of up to `n` items, each as soon as it is full."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == n:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class Segment:
    """Log-probabilities of a part of a recording that is decoded alone, from frame `start` on."""

    start: int
    logp_SV: Tensor


def decoding_segments(
    frames: Iterable[Tensor], longest: int, pause: int, blank: int = 0
) -> Iterator[Segment]:
    """Log-probabilities that come bit by bit, cut into pieces of at most `longest` frames.

    Cuts are in the middle of the clearest pauses, `pause` frames that are most likely blank. What fits stays
    whole, and the pieces do not depend on the bits.
    """
    held, start = torch.zeros(0, 0), 0
    for logp_SV in frames:
        held = torch.cat([held, logp_SV]) if len(held) else logp_SV
        while len(held) > longest:
            first = longest * 2 // 3
            around = held[first - pause // 2 : longest, blank].exp()
            quiet = F.avg_pool1d(around[None, None], max(1, pause), stride=1)[0, 0]
            end = first + int(quiet.argmax())
            yield Segment(start, held[:end])
            held, start = held[end:], start + end
    if len(held):
        yield Segment(start, held)


def speech_frames(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Whether somebody speaks at each frame of 16 kHz audio: bool (S,)."""
    n_frames = int(grid.n_frames(len(wav_T)))
    if n_frames == 0:
        return torch.zeros(0, dtype=torch.bool)
    frames_SW = wav_T[: grid.n_samples(n_frames)].unfold(0, grid.window, grid.hop)
    level_S = 10 * torch.log10(frames_SW.square().mean(1) + _QUIET)
    change_S = _spectral_change(frames_SW)
    pad = (0, -(n_frames - _WINDOW) % _STEP if n_frames > _WINDOW else _WINDOW - n_frames)
    level_NW = F.pad(level_S, pad, value=-torch.inf).unfold(0, _WINDOW, _STEP)
    change_NW = F.pad(change_S, pad).unfold(0, _WINDOW, _STEP)
    loudest_N1 = level_NW.amax(1, keepdim=True)
    active_NW = level_NW > (loudest_N1 - _BELOW_DB).clamp(min=_FLOOR_DB)
    moves_N = level_NW.where(active_NW, torch.nan)
    mean_N1 = moves_N.nanmean(1, keepdim=True)
    spread_N = (moves_N - mean_N1).square().nanmean(1).sqrt()
    changes_N = change_NW.where(active_NW, torch.nan).nanmedian(1).values
    speech_N = (active_NW.sum(1) >= _FEWEST) & (spread_N > _LEVEL_DB) & (changes_N > _CHANGE_DB)
    votes_S, windows_S = torch.zeros(n_frames + pad[1]), torch.zeros(n_frames + pad[1])
    for number, active_W in enumerate(active_NW):
        here = slice(number * _STEP, number * _STEP + _WINDOW)
        windows_S[here] += 1
        if speech_N[number]:
            votes_S[here] += active_W
    found_S = (2 * votes_S >= windows_S.clamp(min=1)).float()  # most windows that see the frame say so
    around_S = F.max_pool1d(found_S[None, None, :n_frames], 2 * _AROUND + 1, 1, _AROUND)
    return around_S[0, 0] > 0


def _spectral_change(frames_SW: Tensor) -> Tensor:
    """Mean over frequencies of how much the log spectrum moves within `_LAG` frames, dB (S,)."""
    power_SF = torch.fft.rfft(frames_SW * torch.hann_window(frames_SW.shape[1])).abs().square()
    # What lies 60 dB below the loudest frequency of a frame is not heard beside it.
    floor_S1 = power_SF.amax(1, keepdim=True) * 1e-6 + _QUIET
    level_SF = 10 * torch.log10(power_SF + floor_S1)
    change_S = torch.zeros(len(frames_SW))
    if len(frames_SW) > _LAG:
        moved_SF = level_SF[_LAG:] - level_SF[:-_LAG]
        change_S[:-_LAG] = (moved_SF - moved_SF.mean(1, keepdim=True)).abs().mean(1)  # louder is no change
        change_S[-_LAG:] = change_S[-_LAG - 1]
    return change_S
