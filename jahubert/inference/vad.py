"""Voice activity detection, and segmentation of long recordings at pauses.

A CTC model trained only on speech also outputs phones for silence, noise and clicks. Within about a second,
and at any level, speech differs from them in three ways: its level varies (unlike steady noise and tones);
its spectral shape varies and changes within 60 ms (unlike wind, beeps and music); and some of its frames are
periodic or, in whispered speech, sustained for 80 ms (unlike key clicks, knocks and steps). All features are
measured above 250 Hz, so that DC offset and mains hum have no effect.
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
from jahubert.phonemes import PhonemeSet

# Durations are in frames of 20 ms, and levels in dB, unless noted otherwise. The thresholds were chosen with
# tools/bench/vad.py.
_WINDOW, _STEP = 64, 16  # length and hop of the analysis windows, in frames
_BANDS = (250.0, 7000.0, 14)  # lowest and highest frequency in Hz, and number of bands
_MIN_LEVEL = -100.0  # level in dBFS below which frames are ignored
_ACTIVE = 30.0  # frames more than this many dB below the loudest frame in the window are ignored
_MIN_LEVEL_STD = 2.5  # minimum standard deviation of the level
_MIN_SHAPE_STD = 1.6  # minimum mean standard deviation of the relative band levels
_MIN_CHANGE = 1.6  # minimum median change in the relative band levels within _LAG frames
_LAG = 3
# Periodic windows: maximum level difference between loud frames and the loudest frame, minimum
# autocorrelation of periodic frames, minimum length of a run of loud, periodic frames, and minimum number of
# frames in runs.
_PERIODIC = (20.0, 0.6, 2, 3)
# Sustained windows: maximum level difference between loud frames and the loudest frame, minimum length of a
# run of loud frames, minimum number of frames in runs, and minimum fraction of the loud frames in runs.
_SUSTAINED = (12.0, 4, 6, 0.7)
_PITCH = (80.0, 420.0, 250.0, 3000.0)  # range of the pitch, and frequency band used to detect it, in Hz
_PITCH_WINDOW, _PITCH_FFT = 640, 1024  # samples; lags of up to 1024 - 640 do not wrap around
_VOTES = 4  # a frame is speech if at least one in _VOTES of its windows votes for it
MARGIN = 12  # number of frames added before and after speech for quiet consonants and CTC spikes
_BLOCK = 256  # number of frames to transform at once; temporary tensors for more would not fit in the cache
_TINY = 1e-13  # added power, which keeps logarithms and quotients finite
_SUPPRESSED = -1e4  # log-probability of phones outside speech


@dataclass(frozen=True)
class Segment:
    """Log-probabilities of a part of a recording that is decoded separately."""

    start: int  # first frame, within the recording
    logp_SV: Tensor


def cut_at_pauses(blocks: Iterable[Tensor], max_frames: int, pause: int, blank: int = 0) -> Iterator[Segment]:
    """Cut a stream of log-probabilities into segments at the clearest pauses.

    The result does not depend on the block sizes. A recording of up to `max_frames` frames is not split.

    Args:
        blocks: log-probabilities (S, V) of consecutive frames.
        max_frames: upper bound on the length of a segment. Cuts are in the last third of this length.
        pause: length in frames of the window whose mean blank probability is maximized. Cuts are at its
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


def speech_frames(wav_T: Tensor, grid: FrameGrid, power_SK: Tensor | None = None) -> Tensor:
    """Return a mask (S,) of the frames of a 16 kHz waveform (T,) that are in or next to speech.

    Args:
        wav_T: 16 kHz waveform.
        grid: mapping between frames and samples.
        power_SK: `power_spectrum` of the waveform, if already computed.
    """
    n_frames = int(grid.n_frames(len(wav_T)))
    if n_frames == 0:
        return torch.zeros(0, dtype=torch.bool, device=wav_T.device)
    if power_SK is None:
        power_SK = power_spectrum(wav_T, grid)
    band_SF = power_SK @ _mel_filters(grid.window).to(power_SK) + _TINY
    level_S = 10 * torch.log10(band_SF.sum(1))
    shape_SF = _relative_levels(band_SF)
    change_S = _spectral_change(shape_SF)
    n_padding = _WINDOW - n_frames if n_frames < _WINDOW else -(n_frames - _WINDOW) % _STEP
    level_NW = F.pad(level_S, (0, n_padding), value=-torch.inf).unfold(0, _WINDOW, _STEP)
    change_NW = F.pad(change_S, (0, n_padding)).unfold(0, _WINDOW, _STEP)
    shape_NFW = F.pad(shape_SF.T, (0, n_padding)).unfold(1, _WINDOW, _STEP).transpose(0, 1)
    loudest_N1 = level_NW.amax(1, keepdim=True)
    active_NW = level_NW > (loudest_N1 - _ACTIVE).clamp(min=_MIN_LEVEL)
    shape_std_N = _std(shape_NFW, active_NW[:, None].expand_as(shape_NFW)).mean(1)
    varies_N = (
        (_std(level_NW, active_NW) > _MIN_LEVEL_STD)
        & (shape_std_N > _MIN_SHAPE_STD)
        & (change_NW.where(active_NW, torch.nan).nanmedian(1).values > _MIN_CHANGE)
    )
    sustained_N = _is_sustained(level_NW)
    # Periodicity is computed only for windows in which it decides the result.
    loud_NW = (level_NW > loudest_N1 - _PERIODIC[0]) & (varies_N & ~sustained_N)[:, None]
    undecided_S = _overlap_add(loud_NW.float())[:n_frames] > 0
    periodicity_S = _periodicity(wav_T, undecided_S, grid)
    periodicity_NW = F.pad(periodicity_S, (0, n_padding)).unfold(0, _WINDOW, _STEP)
    speech_N = varies_N & (sustained_N | _is_periodic(loud_NW, periodicity_NW))
    # Windows with speech vote for their active frames. A frame needs votes from one in `_VOTES` windows.
    votes_S = _overlap_add((active_NW & speech_N[:, None]).float())
    windows_S = _overlap_add(torch.ones_like(level_NW))
    speech_S = (_VOTES * votes_S >= windows_S.clamp(min=1)).float()[None, :n_frames]
    return F.max_pool1d(speech_S, 2 * MARGIN + 1, 1, MARGIN)[0] > 0


def _overlap_add(values_NW: Tensor) -> Tensor:
    """Add overlapping windows (N, W) at their positions, and return the sum (S,)."""
    n_frames = (len(values_NW) - 1) * _STEP + _WINDOW
    return F.fold(values_NW.T[None], (1, n_frames), (1, _WINDOW), stride=(1, _STEP))[0, 0, 0]


def suppress_nonspeech(logp_SV: Tensor, speech_S: Tensor, phonemes: PhonemeSet) -> Tensor:
    """Suppress phones outside speech in log-probabilities, without changing blank and word boundary."""
    phone_V = torch.ones(len(phonemes), dtype=torch.bool, device=logp_SV.device)
    phone_V[phonemes.blank] = False
    if phonemes.boundary >= 0:
        phone_V[phonemes.boundary] = False
    return logp_SV.masked_fill(~speech_S[:, None] & phone_V, _SUPPRESSED)


def power_spectrum(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Return the power (S, K) of frames in bins of 16000 / window Hz (in total 0.5 for a full-scale sine)."""
    n_samples = grid.n_samples(int(grid.n_frames(len(wav_T))))
    hann_W = torch.hann_window(grid.window, device=wav_T.device)
    hann_W *= (2 / hann_W.square().sum() / grid.window).sqrt()
    return _windowed_power(wav_T[:n_samples].float().unfold(0, grid.window, grid.hop), hann_W, grid.window)


def _windowed_power(frames_SW: Tensor, window_W: Tensor, n_fft: int) -> Tensor:
    """Subtract the mean of each frame, apply the window, and return the power spectrum (S, K)."""
    return power(torch.fft.rfft((frames_SW - frames_SW.mean(1, keepdim=True)).mul_(window_W), n_fft))


def power(spectrum: Tensor) -> Tensor:
    """Return the squared magnitude of a complex tensor, without the square root that `abs` computes."""
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)


@lru_cache
def _mel_filters(window: int) -> Tensor:
    """Return triangular mel filters (frequencies, bands)."""
    low, high, n_bands = _BANDS
    mel = torch.linspace(math.log1p(low / 700), math.log1p(high / 700), n_bands + 2, device="cpu")
    edges = 700 * torch.expm1(mel)[:, None]
    hz = torch.arange(window // 2 + 1, device="cpu") * SAMPLE_RATE / window
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).T


def _relative_levels(band_SF: Tensor) -> Tensor:
    """Return the band levels of each frame in dB relative to their mean.

    The power is smoothed over 3 frames, and a floor is added 40 dB below the loudest band of each frame.
    """
    n_frames_S1 = band_SF.new_full((len(band_SF), 1), 3.0)
    n_frames_S1[0] -= 1
    n_frames_S1[-1] -= 1
    padded_SF = F.pad(band_SF, (0, 0, 1, 1))
    smooth_SF = (padded_SF[:-2] + band_SF + padded_SF[2:]) / n_frames_S1
    level_SF = 10 * torch.log10(smooth_SF + 1e-4 * smooth_SF.amax(1, keepdim=True))
    return level_SF - level_SF.mean(1, keepdim=True)


def _spectral_change(shape_SF: Tensor) -> Tensor:
    """Return the mean absolute change (S,) of the relative band levels within `_LAG` frames, in dB."""
    change_S = shape_SF.new_zeros(len(shape_SF))
    if len(shape_SF) > _LAG:
        change_S[:-_LAG] = (shape_SF[_LAG:] - shape_SF[:-_LAG]).abs().mean(1)
        change_S[-_LAG:] = change_S[-_LAG - 1]
    return change_S


def _std(values: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation of the values that `mask` selects in the last dimension (NaN if none)."""
    n = mask.sum(-1, keepdim=True)
    values = values.where(mask, 0.0)
    deviation = (values - values.sum(-1, keepdim=True) / n) * mask
    return (deviation.square().sum(-1) / n[..., 0]).sqrt()


def _periodicity(wav_T: Tensor, frames_S: Tensor, grid: FrameGrid) -> Tensor:
    """Return the maximum normalized autocorrelation (S,) over pitch lags, which is 0 outside `frames_S`."""
    periodicity_S = wav_T.new_zeros(len(frames_S), dtype=torch.float32)
    if not frames_S.any():
        return periodicity_S
    window_W, bins, cos_KL = _pitch_transform(wav_T.device)
    padded_T = F.pad(wav_T.float(), ((_PITCH_WINDOW - grid.window) // 2, _PITCH_WINDOW))
    frames_SW = padded_T.unfold(0, _PITCH_WINDOW, grid.hop)
    for index_N in frames_S.nonzero()[:, 0].split(_BLOCK):
        power_NK = _windowed_power(frames_SW[index_N], window_W, _PITCH_FFT)
        correlation_NL = power_NK[:, bins] @ cos_KL
        periodicity_S[index_N] = correlation_NL[:, 1:].amax(1) / (correlation_NL[:, 0] + _TINY)
    return periodicity_S


@lru_cache
def _pitch_transform(device: torch.device) -> tuple[Tensor, slice, Tensor]:
    """Return constants for computing the autocorrelation over pitch lags from a power spectrum.

    Returns:
        The window (W,); the bins of the frequency band in `_PITCH`; and a matrix (bins, 1 + lags) that
        transforms their power to the autocorrelation at lag 0 and at the pitch lags, divided by that of the
        window.
    """
    min_hz, max_hz, low, high = _PITCH
    n_fft = _PITCH_FFT
    hz = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * SAMPLE_RATE / n_fft
    (bin_K,) = torch.where((hz > low) & (hz < high))
    lags = torch.arange(round(SAMPLE_RATE / max_hz), round(SAMPLE_RATE / min_hz), device="cpu")
    lags = torch.cat([lags.new_zeros(1), lags])
    cos_KL = (2 * math.pi / n_fft * bin_K[:, None] * lags).cos() * 2 / n_fft
    window_W = torch.hann_window(_PITCH_WINDOW, dtype=torch.float64, device="cpu")
    taper_L = torch.fft.irfft(power(torch.fft.rfft(window_W, n_fft)), n_fft)[lags]
    cos_KL *= taper_L[0] / taper_L
    bins = slice(int(bin_K[0]), int(bin_K[-1]) + 1)
    return window_W.float().to(device), bins, cos_KL.float().to(device)


def _is_periodic(loud_NW: Tensor, periodicity_NW: Tensor) -> Tensor:
    """Return whether each window has enough loud, periodic frames in runs (`_PERIODIC`)."""
    _, threshold, run, n_min = _PERIODIC
    return _in_runs(loud_NW & (periodicity_NW > threshold), run).sum(1) >= n_min


def _is_sustained(level_NW: Tensor) -> Tensor:
    """Return whether enough of the loud frames of each window are in runs (`_SUSTAINED`)."""
    below, run, n_min, share = _SUSTAINED
    loud_NW = level_NW > level_NW.amax(1, keepdim=True) - below
    n_N = _in_runs(loud_NW, run).sum(1)
    return (n_N >= n_min) & (n_N >= share * loud_NW.sum(1))


def _in_runs(mask_NW: Tensor, run: int) -> Tensor:
    """Keep only frames in runs of at least `run` frames (morphological opening)."""
    eroded = 1 - F.max_pool1d(1 - mask_NW.float()[:, None], run, 1)
    return F.max_pool1d(F.pad(eroded, (run - 1, run - 1)), run, 1)[:, 0] > 0
