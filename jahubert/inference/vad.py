"""Voice activity detection, and segmentation of long recordings at pauses.

A CTC model trained only on speech also outputs phones for silence, noise and clicks. Within about a second,
and at any level, speech differs from them in three ways: its level varies (unlike steady noise and tones);
its spectral shape varies and changes within 60 ms (unlike wind, beeps and music); and some of its frames are
periodic or, in whispered speech, sustained for 80 ms (unlike key clicks, knocks and steps). All features are
measured above 250 Hz, so a DC offset and mains hum have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frames import SAMPLE_RATE, FrameGrid

# Frames last 20 ms and levels are in dB unless noted. Values were measured with tools/bench/vad.py.
_WINDOW, _STEP = 64, 16  # length and hop of the analysis windows, in frames
_BANDS = (250.0, 7000.0, 14)  # lowest and highest frequency in Hz, number of bands
_MIN_LEVEL = -100.0  # dBFS
_ACTIVE = 30.0  # frames more than this many dB below the loudest in the window are ignored
_MIN_LEVEL_STD = 2.5  # standard deviation of the level
_MIN_SHAPE_STD = 1.6  # mean standard deviation of the relative band levels
_MIN_CHANGE = 1.6  # median change of the relative band levels within _LAG frames
_LAG = 3
_PERIODIC = (20.0, 0.6, 2, 3)  # level below the loudest, autocorrelation, length of a run, frames in runs
_SUSTAINED = (12.0, 4, 6, 0.7)  # level below the loudest, length of a run, frames in runs and their share
_PITCH = (80.0, 420.0, 250.0, 3000.0)  # pitch range, and band searched for it, in Hz
_PITCH_WINDOW = 640  # samples
_VOTES = 4  # a frame is speech if at least one in _VOTES of its windows votes for it
_MARGIN = 12  # frames added around speech for quiet consonants and CTC spikes
_TINY = 1e-13  # power per band


@dataclass(frozen=True)
class Segment:
    """Log-probabilities of a part of a recording, decoded separately."""

    start: int  # first frame, within the recording
    logp_SV: Tensor


def cut_at_pauses(blocks: Iterable[Tensor], max_frames: int, pause: int, blank: int = 0) -> Iterator[Segment]:
    """Cut a stream of log-probabilities into segments at the clearest pauses.

    The result does not depend on the block sizes, and a recording of up to `max_frames` is not split.

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
    """Detect the frames of a 16 kHz waveform (T,) that are in or next to speech: bool (S,)."""
    n_frames = int(grid.n_frames(len(wav_T)))
    if n_frames == 0:
        return torch.zeros(0, dtype=torch.bool, device=wav_T.device)
    band_SF = _band_power(wav_T[: grid.n_samples(n_frames)], grid)
    level_S = 10 * torch.log10(band_SF.sum(1))
    shape_SF = _relative_levels(band_SF)
    change_S = _spectral_change(shape_SF)
    n_padding = _WINDOW - n_frames if n_frames < _WINDOW else -(n_frames - _WINDOW) % _STEP
    level_NW = F.pad(level_S, (0, n_padding), value=-torch.inf).unfold(0, _WINDOW, _STEP)
    change_NW = F.pad(change_S, (0, n_padding)).unfold(0, _WINDOW, _STEP)
    shape_NFW = F.pad(shape_SF.T, (0, n_padding)).unfold(1, _WINDOW, _STEP).transpose(0, 1)
    loudest_N1 = level_NW.amax(1, keepdim=True)
    active_NW = level_NW > (loudest_N1 - _ACTIVE).clamp(min=_MIN_LEVEL)
    periodicity_NW = F.pad(_periodicity(wav_T, n_frames, grid), (0, n_padding)).unfold(0, _WINDOW, _STEP)
    shape_std_N = _std(shape_NFW, active_NW[:, None].expand_as(shape_NFW)).mean(1)
    speech_N = (
        (_std(level_NW, active_NW) > _MIN_LEVEL_STD)
        & (shape_std_N > _MIN_SHAPE_STD)
        & (change_NW.where(active_NW, torch.nan).nanmedian(1).values > _MIN_CHANGE)
        & (_is_periodic(level_NW, periodicity_NW) | _is_sustained(level_NW))
    )
    # Windows with speech vote for their active frames; a frame needs votes from 1 in `_VOTES` windows.
    votes_S = level_S.new_zeros(n_frames + n_padding)
    windows_S = torch.zeros_like(votes_S)
    for i, active_W in enumerate(active_NW):
        window = slice(i * _STEP, i * _STEP + _WINDOW)
        windows_S[window] += 1
        if speech_N[i]:
            votes_S[window] += active_W
    speech_S = (_VOTES * votes_S >= windows_S.clamp(min=1)).float()[None, None, :n_frames]
    return F.max_pool1d(speech_S, 2 * _MARGIN + 1, 1, _MARGIN)[0, 0] > 0


def _band_power(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Power (S, F) in mel bands; a full-scale sine has power 0.5."""
    frames_SW = wav_T.float().unfold(0, grid.window, grid.hop)
    frames_SW = frames_SW - frames_SW.mean(1, keepdim=True)
    hann_W, mel_KF = _filters(grid.window)
    power_SK = torch.fft.rfft(frames_SW * hann_W.to(frames_SW)).abs().square()
    return power_SK @ mel_KF.to(frames_SW) + _TINY


@lru_cache
def _filters(window: int) -> tuple[Tensor, Tensor]:
    """Hann window (W,) and triangular mel filters (frequencies, bands), scaled to power."""
    low, high, n_bands = _BANDS
    mel = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), n_bands + 2, device="cpu")
    edges = 700 * torch.expm1(mel)[:, None]
    hz = torch.arange(window // 2 + 1, device="cpu") * SAMPLE_RATE / window
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0).T
    hann = torch.hann_window(window, device="cpu")
    return hann, filters * 2 / hann.square().sum() / window


def _relative_levels(band_SF: Tensor) -> Tensor:
    """Band levels in dB, smoothed over 3 frames, relative to their mean, with a range of 40 dB."""
    smooth_SF = F.avg_pool1d(band_SF.T[None], 3, 1, 1, count_include_pad=False)[0].T
    level_SF = 10 * torch.log10(smooth_SF + 1e-4 * smooth_SF.amax(1, keepdim=True))
    return level_SF - level_SF.mean(1, keepdim=True)


def _spectral_change(shape_SF: Tensor) -> Tensor:
    """Mean absolute change of the relative band levels within `_LAG` frames, dB (S,)."""
    change_S = shape_SF.new_zeros(len(shape_SF))
    if len(shape_SF) > _LAG:
        change_S[:-_LAG] = (shape_SF[_LAG:] - shape_SF[:-_LAG]).abs().mean(1)
        change_S[-_LAG:] = change_S[-_LAG - 1]
    return change_S


def _std(values: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation over the last dimension of the values in the mask; NaN where it is empty."""
    values = values.where(mask, torch.nan)
    return (values - values.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()


def _periodicity(wav_T: Tensor, n_frames: int, grid: FrameGrid) -> Tensor:
    """Maximum normalized autocorrelation (S,) of each frame over the lags of pitch periods; at most 1."""
    min_hz, max_hz, low, high = _PITCH
    first, last = round(SAMPLE_RATE / max_hz), round(SAMPLE_RATE / min_hz)
    n_fft = 2 * _PITCH_WINDOW
    before = (_PITCH_WINDOW - grid.window) // 2
    padded_T = F.pad(wav_T.float(), (before, _PITCH_WINDOW))
    frames_SW = padded_T.unfold(0, _PITCH_WINDOW, grid.hop)[:n_frames]
    frames_SW = frames_SW - frames_SW.mean(1, keepdim=True)
    hann_W = torch.hann_window(_PITCH_WINDOW, device=wav_T.device)
    hz = torch.arange(n_fft // 2 + 1, device=wav_T.device) * SAMPLE_RATE / n_fft
    power_SK = torch.fft.rfft(frames_SW * hann_W, n_fft).abs().square()
    correlation_SL = torch.fft.irfft(power_SK * ((hz > low) & (hz < high)), n_fft)
    taper_L = torch.fft.irfft(torch.fft.rfft(hann_W, n_fft).abs().square(), n_fft)
    taper_L = taper_L[first:last] / taper_L[0]
    return (correlation_SL[:, first:last] / (correlation_SL[:, :1] + _TINY) / taper_L).amax(1)


def _is_periodic(level_NW: Tensor, periodicity_NW: Tensor) -> Tensor:
    """Return whether a window has voiced frames."""
    below, threshold, run, n_min = _PERIODIC
    loud_NW = level_NW > level_NW.amax(1, keepdim=True) - below
    return _in_runs(loud_NW & (periodicity_NW > threshold), run).sum(1) >= n_min


def _is_sustained(level_NW: Tensor) -> Tensor:
    """Return whether most loud frames of a window are in runs of loud frames."""
    below, run, n_min, share = _SUSTAINED
    loud_NW = level_NW > level_NW.amax(1, keepdim=True) - below
    n_N = _in_runs(loud_NW, run).sum(1)
    return (n_N >= n_min) & (n_N >= share * loud_NW.sum(1))


def _in_runs(mask_NW: Tensor, run: int) -> Tensor:
    """Keep only frames in runs of at least `run` frames (morphological opening)."""
    eroded = 1 - F.max_pool1d(1 - mask_NW.float()[:, None], run, 1)
    return F.max_pool1d(F.pad(eroded, (run - 1, run - 1)), run, 1)[:, 0] > 0
