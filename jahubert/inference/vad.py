"""Voice activity detection, and segmentation of long recordings at pauses.

A CTC model that was trained on speech alone also outputs phones for silence, noise and music. Speech differs
from them in three ways: it is louder than -60 dBFS, its level varies by several dB within a second (that of
noise does not), and so does its spectrum over 40 ms (that of tones does not).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frames import FrameGrid

# Voice activity, in frames of 20 ms; measured on words, sentences, noise and tones (LOG.md).
_WINDOW, _STEP = 64, 16  # frames over which level and spectrum are watched
_FLOOR_DB = -60.0  # below full scale
_BELOW_DB = 30.0  # quieter than the loudest frame of the window by this: not active
_FEWEST = 4  # active frames of a window that has speech
_LEVEL_DB, _CHANGE_DB = 2.5, 2.6  # standard deviation of the level; median change of the spectrum
_LAG = 2  # frames between two spectra
_AROUND = 12  # frames around speech that are kept: quiet consonants, and room for CTC's spikes
_QUIET = 1e-10


@dataclass(frozen=True)
class Segment:
    """Log-probabilities of a part of a recording that is decoded on its own."""

    start: int  # first frame, within the recording
    logp_SV: Tensor


def cut_at_pauses(blocks: Iterable[Tensor], max_frames: int, pause: int, blank: int = 0) -> Iterator[Segment]:
    """Cut a stream of log-probabilities into segments at the clearest pauses.

    The result does not depend on the block sizes, and a recording of up to `max_frames` stays whole.

    Args:
        blocks: log-probabilities (S, V) of consecutive frames.
        max_frames: upper bound on the length of a segment; cuts are in its last third.
        pause: length in frames of the window whose mean blank probability is maximized; cuts are at its
            center.
        blank: index of the blank symbol.
    """
    buffer = torch.zeros(0, 0, device="cpu")
    start = 0
    for logp_SV in blocks:
        buffer = torch.cat([buffer, logp_SV]) if len(buffer) else logp_SV
        while len(buffer) > max_frames:
            first = max_frames * 2 // 3
            blank_S = buffer[first - pause // 2 : max_frames, blank].exp()
            mean_S = F.avg_pool1d(blank_S[None, None], max(1, pause), stride=1)[0, 0]
            end = first + int(mean_S.argmax())
            yield Segment(start, buffer[:end])
            buffer = buffer[end:]
            start += end
    if len(buffer):
        yield Segment(start, buffer)


def speech_frames(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Whether somebody speaks at each frame of 16 kHz audio: bool (S,)."""
    n_frames = int(grid.n_frames(len(wav_T)))
    if n_frames == 0:
        return torch.zeros(0, dtype=torch.bool, device=wav_T.device)
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
    votes_S = wav_T.new_zeros(n_frames + pad[1])
    windows_S = torch.zeros_like(votes_S)
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
    power_SF = (
        torch.fft.rfft(frames_SW * torch.hann_window(frames_SW.shape[1], device=frames_SW.device))
        .abs()
        .square()
    )
    # What lies 60 dB below the loudest frequency of a frame is not heard beside it.
    floor_S1 = power_SF.amax(1, keepdim=True) * 1e-6 + _QUIET
    level_SF = 10 * torch.log10(power_SF + floor_S1)
    change_S = frames_SW.new_zeros(len(frames_SW))
    if len(frames_SW) > _LAG:
        moved_SF = level_SF[_LAG:] - level_SF[:-_LAG]
        change_S[:-_LAG] = (moved_SF - moved_SF.mean(1, keepdim=True)).abs().mean(1)  # louder is no change
        change_S[-_LAG:] = change_S[-_LAG - 1]
    return change_S
