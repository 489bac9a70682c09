"""Conditioning of speech before recognition: DC offset, mains hum and level.

Encoders are trained on audio at normal levels. The epsilon of their first norm makes them sensitive to quiet
audio, and hum of -40 dBFS already changes a third of the phonemes that the built-in model recognizes. Hum is
estimated as sinusoids and subtracted: a high-pass filter would remove the pitch of low voices as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frames import SAMPLE_RATE, FrameGrid

SPEECH_LEVEL = -20.0  # dBFS, mean over speech
_RANGE = 20.0  # frames more than this many dB below the loudest are pauses
_MAINS = (50.0, 60.0)  # Hz
_MAX_HUM = 250.0  # Hz, highest harmonic
_TOLERANCE = 0.01  # relative to the mains frequency
_MIN_SHARE = 0.2  # minimum share of a hum line in the power below _MAX_HUM in quiet parts
_MAX_LINES = 6
_DECIMATION = 16  # downsampling factor for the line search
_LONG = 4.0  # seconds; above this length, amplitude and phase may drift
_TINY = 1e-12


def condition(wav_T: Tensor, speech_S: Tensor, grid: FrameGrid) -> Tensor:
    """Remove DC offset and mains hum from a waveform (T,) and scale its speech to `SPEECH_LEVEL`.

    Args:
        wav_T: 16 kHz waveform.
        speech_S: mask of the frames with speech; without speech, the waveform is returned unchanged.
        grid: mapping between frames and samples.
    """
    if not speech_S.any():
        return wav_T
    wav_T = wav_T - wav_T.mean()
    wav_T = wav_T - _hum(wav_T, grid)
    power_S = _frame_power(wav_T, grid)[: len(speech_S)]
    power_S = power_S[speech_S]
    level = 10 * torch.log10(power_S[power_S >= power_S.max() * 10 ** (-_RANGE / 10)].mean() + _TINY)
    return wav_T * 10 ** ((SPEECH_LEVEL - level) / 20)


def _frame_power(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    return wav_T.unfold(0, grid.window, grid.hop).square().mean(1)


def _hum(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Estimate the mains hum in a waveform (T,); zeros without hum.

    Weighted least squares, in which parts with little power above the hum, and thus without speech, count
    most. Harmonics are added one by one, strongest first, as long as they stand out from the residual.
    """
    x_T = wav_T.double()
    low_T = _below(x_T, _MAX_HUM + 20)
    hum_T = torch.zeros_like(x_T)
    high_T = x_T - low_T
    for sharpness in (1, 2):
        hum_T = _fit(x_T, low_T, _quietness(high_T, sharpness, grid))
        if hum_T.any():  # hum leaks into the weights at the ends: recompute them without it
            rest_T = x_T - hum_T
            high_T = rest_T - _below(rest_T, _MAX_HUM + 20)
    return hum_T.to(wav_T)


def _fit(x_T: Tensor, low_T: Tensor, weight_T: Tensor) -> Tensor:
    """Fit the harmonics in a waveform `x_T`, searched in `low_T`; returns their sum."""
    columns: list[Tensor] = []
    hum_T = torch.zeros_like(x_T)
    for _ in range(_MAX_LINES):
        frequency = _strongest_line(low_T - hum_T, weight_T)
        if frequency is None:
            break
        for _ in range(3):
            frequency += _frequency_error(frequency, x_T - hum_T, weight_T)
        columns += _basis(frequency, x_T)
        basis_TK = torch.stack(columns, 1)
        hum_T = basis_TK @ _solve(basis_TK, x_T, weight_T)
    return hum_T


def _solve(basis_TK: Tensor, x_T: Tensor, weight_T: Tensor) -> Tensor:
    weighted_KT = (basis_TK * weight_T[:, None]).T
    return torch.linalg.lstsq(weighted_KT @ basis_TK, weighted_KT @ x_T).solution


def _frequency_error(frequency: float, x_T: Tensor, weight_T: Tensor) -> float:
    """Frequency correction in Hz by one Gauss-Newton step, at most half a resolution cell."""
    cos_T, sin_T = _basis(frequency, x_T)[:2]
    time_T = torch.arange(len(x_T), device=x_T.device) / SAMPLE_RATE
    basis_TK = torch.stack([cos_T, sin_T, time_T * cos_T, time_T * sin_T], 1)
    a, b, c, d = _solve(basis_TK, x_T, weight_T).tolist()
    limit = SAMPLE_RATE / len(x_T) / 2
    error = (b * c - a * d) / (a * a + b * b + _TINY) / (2 * math.pi)
    return max(-limit, min(limit, error))


def _below(x_T: Tensor, hz: float) -> Tensor:
    """Low-pass filter a waveform."""
    spectrum = torch.fft.rfft(x_T)
    spectrum[round(hz * len(x_T) / SAMPLE_RATE) :] = 0
    return torch.fft.irfft(spectrum, len(x_T))


def _quietness(high_T: Tensor, sharpness: int, grid: FrameGrid) -> Tensor:
    """Weights (T,), mean 1, that decrease with the power above the hum."""
    power_S = F.max_pool1d(_frame_power(high_T, grid)[None, None], 5, 1, 2)[0, 0]
    weight_S = (power_S + 1e-4 * power_S.max() + _TINY) ** -sharpness
    weight_T = weight_S.repeat_interleave(grid.hop)
    weight_T = F.pad(weight_T[None, None], (0, max(0, len(high_T) - len(weight_T))), mode="replicate")[0, 0]
    return (weight_T / weight_T.mean())[: len(high_T)]


def _strongest_line(low_T: Tensor, weight_T: Tensor) -> float | None:
    """Frequency in Hz of the strongest mains harmonic; None if none stands out."""
    low_T, weight_T = low_T[::_DECIMATION], weight_T[::_DECIMATION]
    rate = SAMPLE_RATE // _DECIMATION
    n_fft = 4 * len(low_T)
    power_K = torch.fft.rfft(low_T * weight_T, n_fft).abs().square()
    total = float((weight_T * low_T.square()).sum() * weight_T.sum()) / 2 + _TINY
    best = None
    best_share = _MIN_SHARE
    for mains in _MAINS:
        for harmonic in range(1, int(_MAX_HUM / mains) + 1):
            nominal = mains * harmonic * n_fft / rate
            first, last = math.floor(nominal * (1 - _TOLERANCE)), math.ceil(nominal * (1 + _TOLERANCE)) + 1
            peak = first + int(power_K[first:last].argmax())
            share = float(power_K[peak]) / total
            if share > best_share:
                best, best_share = _interpolate(power_K, peak) * rate / n_fft, share
    return best


def _basis(frequency: float, x_T: Tensor) -> list[Tensor]:
    """Return sinusoids as long as `x_T`; for long inputs, amplitude and phase may change linearly."""
    n = len(x_T)
    time_T = torch.arange(n, dtype=torch.float64, device=x_T.device) / SAMPLE_RATE
    phase_T = 2 * math.pi * frequency * time_T
    waves = [phase_T.cos(), phase_T.sin()]
    if n < _LONG * SAMPLE_RATE:
        return waves
    slope_T = torch.linspace(-1, 1, n, dtype=torch.float64, device=x_T.device)
    return [*waves, *(wave_T * slope_T for wave_T in waves)]


def _interpolate(power_K: Tensor, peak: int) -> float:
    """Position of a maximum between bins, from a parabola through three bins."""
    left, middle, right = (float(power_K[peak + i] + _TINY) for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    return peak + (0.5 * (left - right) / curvature if curvature < 0 else 0.0)
