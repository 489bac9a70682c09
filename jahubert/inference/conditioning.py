"""Conditioning of speech before recognition: DC offset, mains hum and level.

Encoders are trained on audio at normal levels. The epsilon in the first norm distorts the features of quiet
audio, and hum at -40 dBFS already changes a third of the phonemes that the built-in model recognizes. Hum is
estimated as a sum of sinusoids and subtracted, because a high-pass filter would also remove the pitch of low
voices.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.silero import silero_speech_frames
from jahubert.inference.vad import power, power_spectrum, speech_frames

SPEECH_LEVEL = -20.0  # mean level of conditioned speech in dBFS
_RANGE = 20.0  # frames more than this many dB below the loudest frame are pauses
_MAINS = (50.0, 60.0)  # mains frequencies in Hz
_MAX_HUM = 250.0  # maximum frequency of a harmonic in Hz
_TOLERANCE = 0.005  # maximum relative deviation from the mains frequency
_MIN_SHARE = 0.2  # minimum share of a line of hum in the power below _CUTOFF in quiet parts
_CUTOFF = 270.0  # upper end of the searched band in Hz
_MAX_LINES = 5  # maximum number of spectral lines of hum
_DECIMATION = 16  # downsampling factor of the signal in which hum is estimated
_TAPS = 64  # length of the low-pass filter (a Hann window) before downsampling
_LONG = 4.0  # seconds; from this length on, the amplitude and phase of the hum may drift
_TINY = 1e-12


def prepare_speech(
    wav_T: Tensor, grid: FrameGrid, vad: bool | Literal["silero"] = True, conditioning: bool = True
) -> tuple[Tensor, Tensor]:
    """Prepare a 16 kHz waveform (T,) for recognition: detect speech and condition the audio.

    The level is measured in detected speech. Audio without detected speech is not conditioned, but with
    vad=False, it is all assumed to be speech.

    Args:
        wav_T: 16 kHz waveform.
        grid: mapping between frames and samples.
        vad: whether to select frames with speech. "silero" selects only those that silero-vad also detects,
            and False selects all frames.
        conditioning: whether to condition the audio (see `condition`).

    Returns:
        The waveform (T,), conditioned if requested, and the mask (S,) of the selected frames.
    """
    n_frames = int(grid.n_frames(len(wav_T)))
    all_S = torch.ones(n_frames, dtype=torch.bool, device=wav_T.device)
    if not n_frames or not (vad or conditioning):
        return wav_T, all_S
    power_SK = power_spectrum(wav_T, grid)
    speech_S = speech_frames(wav_T, grid, power_SK)
    if not vad and not speech_S.any():
        speech_S = all_S
    conditioned_T = condition(wav_T, speech_S, grid, power_SK) if conditioning or vad == "silero" else wav_T
    if vad == "silero" and speech_S.any():
        speech_S = speech_S & silero_speech_frames(conditioned_T, grid)
    return conditioned_T if conditioning else wav_T, speech_S if vad else all_S


def condition(wav_T: Tensor, speech_S: Tensor, grid: FrameGrid, power_SK: Tensor | None = None) -> Tensor:
    """Remove DC offset and mains hum from a waveform (T,), and scale it so that speech has `SPEECH_LEVEL`.

    Args:
        wav_T: 16 kHz waveform.
        speech_S: mask of the frames with speech. Without speech, the waveform is returned unchanged.
        grid: mapping between frames and samples.
        power_SK: `vad.power_spectrum` of the waveform, if already computed.
    """
    if not speech_S.any():
        return wav_T
    if power_SK is None:
        power_SK = power_spectrum(wav_T, grid)
    wav_T = _remove_hum(wav_T - wav_T.mean(), power_SK, grid)
    frames_SW = wav_T.unfold(0, grid.window, grid.hop)[: len(speech_S)]
    power_S = (torch.linalg.vector_norm(frames_SW, dim=1)[speech_S]).square() / grid.window
    level = 10 * torch.log10(power_S[power_S >= power_S.max() * 10 ** (-_RANGE / 10)].mean() + _TINY)
    return wav_T * 10 ** ((SPEECH_LEVEL - level) / 20)


def _remove_hum(wav_T: Tensor, power_SK: Tensor, grid: FrameGrid) -> Tensor:
    """Subtract the mains hum from a waveform (T,) with the given `power_spectrum`.

    The hum is fitted by weighted least squares on the downsampled waveform. Parts with little power at
    frequencies above `_CUTOFF`, and thus without speech, have the largest weights. Harmonics are added one by
    one, the strongest first, as long as they stand out from the residual.
    """
    if len(wav_T) < 2 * _TAPS:
        return wav_T
    low_N = _downsample(wav_T)
    equalized_N = _equalize(low_N)
    position_N = torch.arange(len(low_N), device=wav_T.device) * _DECIMATION + (_TAPS - 1) / 2
    frequencies: list[float] = []
    clean_T = wav_T
    for sharpness in (1, 2):
        weight_N = _quietness(power_SK, sharpness, position_N, grid)
        frequencies, amplitudes_K = _fit(low_N, equalized_N, weight_N, position_N, len(wav_T), frequencies)
        if frequencies:
            position_T = torch.arange(len(wav_T), device=wav_T.device)
            hum_T = _basis(frequencies, position_T, len(wav_T)) @ amplitudes_K
            clean_T = wav_T - hum_T.to(wav_T)
            if sharpness == 1:
                # Hum leaks into higher bins, so it is removed before the new weights are computed.
                power_SK = power_spectrum(clean_T, grid)
    return clean_T


def _downsample(wav_T: Tensor) -> Tensor:
    """Low-pass filter a waveform (T,) without padding, and downsample it by `_DECIMATION` to float64 (N,)."""
    taps = torch.hann_window(_TAPS, periodic=False, dtype=torch.float32, device=wav_T.device)
    taps_BD = (taps / taps.sum()).view(-1, _DECIMATION)
    n_blocks = len(wav_T) // _DECIMATION
    products_BN = taps_BD @ wav_T[: n_blocks * _DECIMATION].view(n_blocks, _DECIMATION).T
    n_low = n_blocks - len(taps_BD) + 1
    low_N: Tensor = sum(products_N[b : b + n_low] for b, products_N in enumerate(products_BN)).double()
    return low_N


def _filter_gain(hz: Tensor) -> Tensor:
    """Return the gain of the low-pass filter in `_downsample` at the given frequencies."""
    taps = torch.hann_window(_TAPS, periodic=False, dtype=torch.float64, device=hz.device)
    offset = torch.arange(_TAPS, device=hz.device) - (_TAPS - 1) / 2
    return (2 * math.pi / SAMPLE_RATE * hz[:, None].double() * offset).cos() @ taps / taps.sum()


def _fit(
    low_N: Tensor,
    equalized_N: Tensor,
    weight_N: Tensor,
    position_N: Tensor,
    n_samples: int,
    initial: list[float],
) -> tuple[list[float], Tensor]:
    """Fit mains harmonics in a downsampled waveform, starting from the `initial` frequencies.

    Args:
        low_N: the downsampled waveform.
        equalized_N: result of `_equalize` for the downsampled waveform, in which harmonics are detected.
        weight_N: weight of each value in the fit.
        position_N: position of each value in the original waveform.
        n_samples: length of the original waveform.
        initial: known frequencies, to which harmonics are added.

    Returns:
        The frequencies of the harmonics in Hz, and the factors (K,) by which the columns of their `_basis`
        must be multiplied to give the hum in the original waveform.
    """
    frequencies: list[float] = []
    amplitudes_K = low_N.new_zeros(0)
    residual_N = low_N
    while len(frequencies) < _MAX_LINES:
        if len(frequencies) < len(initial):
            frequency: float | None = initial[len(frequencies)]
        else:
            bands = _candidates(frequencies, SAMPLE_RATE / n_samples)
            frequency = _strongest_line(equalized_N, weight_N, bands)
        if frequency is None:
            break
        for _ in range(3):
            frequency += _frequency_error(frequency, residual_N, weight_N, position_N, n_samples)
        frequencies.append(frequency)
        basis_NK = _basis(frequencies, position_N, n_samples)
        amplitudes_K = _solve(basis_NK, low_N, weight_N)
        residual_N = low_N - basis_NK @ amplitudes_K
        equalized_N = _equalize(residual_N)
    if frequencies:
        gain_F = _filter_gain(low_N.new_tensor(frequencies))
        amplitudes_K = amplitudes_K / gain_F.repeat_interleave(len(amplitudes_K) // len(gain_F))
    return frequencies, amplitudes_K


def _solve(basis_NK: Tensor, x_N: Tensor, weight_N: Tensor) -> Tensor:
    weighted_KN = (basis_NK * weight_N[:, None]).T
    solution_K: Tensor = torch.linalg.lstsq(weighted_KN @ basis_NK, weighted_KN @ x_N).solution
    return solution_K


def _frequency_error(
    frequency: float, x_N: Tensor, weight_N: Tensor, position_N: Tensor, n_samples: int
) -> float:
    """Return the correction in Hz of one Gauss-Newton step, limited to half the frequency resolution."""
    time_N = position_N.double() / SAMPLE_RATE
    phase_N = 2 * math.pi * frequency * time_N
    cos_N, sin_N = phase_N.cos(), phase_N.sin()
    basis_NK = torch.stack([cos_N, sin_N, time_N * cos_N, time_N * sin_N], 1)
    a, b, c, d = _solve(basis_NK, x_N, weight_N).tolist()
    limit = SAMPLE_RATE / n_samples / 2
    error: float = (b * c - a * d) / (a * a + b * b + _TINY) / (2 * math.pi)
    return max(-limit, min(limit, error))


def _quietness(power_SK: Tensor, sharpness: int, position_N: Tensor, grid: FrameGrid) -> Tensor:
    """Return weights (N,) with mean 1 that decrease with the power at frequencies above the hum."""
    first = math.ceil(_CUTOFF * grid.window / SAMPLE_RATE)  # first bin above the frequencies of the hum
    power_S = F.max_pool1d(power_SK[:, first:].sum(1)[None], 5, 1, 2)[0].double()
    weight_S = (power_S + 1e-4 * power_S.max() + _TINY) ** -sharpness
    weight_N = weight_S[(position_N / grid.hop).long().clamp(max=len(weight_S) - 1)]
    return weight_N / weight_N.mean()


def _candidates(frequencies: list[float], resolution: float) -> list[tuple[float, float]]:
    """Return the bands (low, high) in Hz that may contain the next line, given the lines already found.

    The first line must be the first or second harmonic, because higher harmonics alone belong to a voice.
    All other lines are harmonics of the same fundamental.
    """
    if not frequencies:
        nominal = [mains * harmonic for mains in _MAINS for harmonic in (1, 2)]
        return [(hz * (1 - _TOLERANCE), hz * (1 + _TOLERANCE)) for hz in nominal]
    first = frequencies[0]
    fundamental = first if first < 1.5 * min(_MAINS) else first / 2
    harmonics = [fundamental * n for n in range(1, int(_MAX_HUM / fundamental + 0.5) + 1)]
    return [
        (hz - resolution, hz + resolution)
        for hz in harmonics
        if all(abs(hz - other) > fundamental / 2 for other in frequencies)
    ]


def _strongest_line(low_N: Tensor, weight_N: Tensor, bands: list[tuple[float, float]]) -> float | None:
    """Return the frequency in Hz of the strongest line in the bands, or None if no line stands out."""
    rate = SAMPLE_RATE // _DECIMATION
    n_fft = _fft_size(2 * len(low_N))
    power_K = power(torch.fft.rfft((low_N * weight_N).float(), n_fft))
    total = float((weight_N * low_N.square()).sum() * weight_N.sum()) / 2 + _TINY
    best = None
    best_share = _MIN_SHARE
    for low, high in bands:
        first, last = math.floor(low * n_fft / rate), math.ceil(high * n_fft / rate) + 1
        peak = first + int(power_K[first:last].argmax())
        share = float(power_K[peak]) / total
        if share > best_share:
            best, best_share = _interpolate(power_K, peak) * rate / n_fft, share
    return best


def _equalize(low_N: Tensor) -> Tensor:
    """Undo the gain of the filter in `_downsample` up to `_CUTOFF`, and remove all higher frequencies."""
    n_fft = _fft_size(len(low_N))
    n_bins = round(_CUTOFF * n_fft / (SAMPLE_RATE // _DECIMATION))
    spectrum = torch.fft.rfft(low_N, n_fft)
    hz = torch.linspace(0, _CUTOFF, 28, device=low_N.device)  # the gain is smooth and can be interpolated
    gain_K = F.interpolate(_filter_gain(hz)[None, None], n_bins, mode="linear", align_corners=True)[0, 0]
    spectrum[:n_bins] /= gain_K
    spectrum[n_bins:] = 0
    filtered_N: Tensor = torch.fft.irfft(spectrum, n_fft)[: len(low_N)]
    return filtered_N


def _fft_size(n: int) -> int:
    """Round up to an even number without large prime factors, which would make FFTs slow."""
    step = max(2, 1 << (n.bit_length() - 4))
    return -(-n // step) * step


def _basis(frequencies: list[float], position_N: Tensor, n_samples: int) -> Tensor:
    """Return sinusoids (N, K) at sample positions in a recording of `n_samples` samples.

    In long recordings, amplitude and phase may change linearly.
    """
    time_N = position_N.double() / SAMPLE_RATE
    slope_N = 2 * position_N.double() / max(1, n_samples - 1) - 1
    waves: list[Tensor] = []
    for frequency in frequencies:
        phase_N = 2 * math.pi * frequency * time_N
        pair = [phase_N.cos(), phase_N.sin()]
        waves += pair
        if n_samples >= _LONG * SAMPLE_RATE:
            waves += [wave_N * slope_N for wave_N in pair]
    return torch.stack(waves, 1)


def _interpolate(power_K: Tensor, peak: int) -> float:
    """Interpolate the position of a maximum between bins with a parabola through three bins."""
    left, middle, right = (float(power_K[peak + i] + _TINY) for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    return peak + (0.5 * (left - right) / curvature if curvature < 0 else 0.0)
