"""On-the-fly waveform augmentation: speed, reverberation, other speech, noise, band limits, codec and gain.

All random choices are determined by (seed, epoch, row), as for crops and masks. Results therefore depend
neither on the number of workers nor on interruptions. The speed of an utterance is drawn without reading its
audio, so that the sampler knows the resulting length. The effects need no recordings of rooms or noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.train.data.masking import seeded_rng
from jahubert.train.experiment.config import interval_errors, raise_config_errors, range_errors

Read = Callable[[int, int, int], Tensor]  # (row, first sample, number of samples) -> float32 (T,)

EFFECTS = ("speed", "reverb", "mix", "noise", "band", "codec", "gain")  # in the order of application
_MAX_OTHERS = 3  # maximum number of utterances that are mixed into an utterance
_FFT_BLOCK = 4096  # FFT lengths are multiples of this and therefore have no large prime factors
_MIN_POWER = 1e-12  # waveforms with less power are considered silent
_MU = 255.0  # parameter of the mu-law (ITU-T G.711)
_SPEED_STEPS = 100  # speeds are rounded to multiples of 1 / _SPEED_STEPS


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities of the effects (default: 0), and ranges from which the effect parameters are drawn."""

    # Probability of resampling, which changes length and pitch. It must be 0 in pretraining, because a change
    # of speed would change the times of the units.
    speed_prob: float = 0.0
    speed: tuple[float, float] = (0.9, 1.1)  # range of the speed factor
    reverb_prob: float = 0.0  # probability of reverberation in a synthetic room
    reverb_seconds: tuple[float, float] = (0.1, 0.7)  # range of the reverberation time (RT60)
    reverb_direct_db: tuple[float, float] = (0.0, 12.0)  # range of the direct-to-reverberant ratio in dB
    # Probability of mixing in up to 3 other training utterances, each for at most half of the duration.
    mix_prob: float = 0.0
    # Range in dB of the level of the utterance, relative to the mixed-in speech.
    mix_snr_db: tuple[float, float] = (5.0, 20.0)
    noise_prob: float = 0.0  # probability of stationary noise
    noise_snr_db: tuple[float, float] = (5.0, 30.0)  # range of the signal-to-noise ratio in dB
    noise_tilt: tuple[float, float] = (0.0, 2.0)  # range of the spectral slope: 0 white, 1 pink, 2 brown
    band_prob: float = 0.0  # probability of band-pass filtering, e.g. 300 to 3400 Hz as in telephone speech
    band_low_hz: tuple[float, float] = (50.0, 300.0)  # range of the lower cutoff frequency
    band_high_hz: tuple[float, float] = (3400.0, 7600.0)  # range of the upper cutoff frequency
    codec_prob: float = 0.0  # probability of mu-law quantization
    codec_bits: tuple[int, int] = (5, 8)  # range of the number of bits per sample
    gain_prob: float = 0.0  # probability of a random gain, after which samples are clipped at full scale
    gain_db: tuple[float, float] = (-20.0, 6.0)  # range of the change in level in dB

    def __post_init__(self) -> None:
        shares = tuple(field.name for field in fields(self) if field.name.endswith("_prob"))
        errors = range_errors(self, {"in [0, 1]": shares})
        errors += interval_errors(
            self,
            {
                "speed": (0.25, 4),
                "reverb_seconds": (0.02, 10),
                "reverb_direct_db": (-60, 60),
                "mix_snr_db": (-60, 100),
                "noise_snr_db": (-60, 100),
                "noise_tilt": (-4, 4),
                "band_low_hz": (0, SAMPLE_RATE / 2),
                "band_high_hz": (0, SAMPLE_RATE / 2),
                "codec_bits": (2, 16),
                "gain_db": (-100, 60),
            },
        )
        if not errors and self.band_low_hz[1] >= self.band_high_hz[0]:
            errors.append(f"band_low_hz={self.band_low_hz} must be below band_high_hz={self.band_high_hz}")
        raise_config_errors(errors)

    @property
    def enabled(self) -> bool:
        """Whether any effect has a probability above 0."""
        return any(getattr(self, field.name) > 0 for field in fields(self) if field.name.endswith("_prob"))

    def max_lengths(self, n_samples: np.ndarray) -> np.ndarray:
        """Compute upper bounds of the lengths (samples, int64) of utterances after speed changes."""
        return _length(n_samples, min(1.0, self.speed[0]) if self.speed_prob else 1.0)


class Augmenter:
    """Augmentation of the utterances in a manifest.

    Args:
        config: probabilities and ranges of the effects.
        seed: seed of all random choices.
        rows: manifest rows of the utterances that may be mixed into others.
        n_samples: lengths of all utterances in the manifest.
        read: function that reads a part of an utterance.
        min_samples: lengths below which a higher speed must not shorten the utterances in the manifest. An
            utterance that is shorter than that is not shortened. None: one frame.
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        rows: np.ndarray,
        n_samples: np.ndarray,
        read: Read,
        min_samples: np.ndarray | None = None,
    ):
        self.config, self.seed, self.rows, self.n_samples, self.read = config, seed, rows, n_samples, read
        if min_samples is None:
            min_samples = np.full(len(n_samples), HUBERT.n_samples(1))
        self.min_samples = np.minimum(n_samples, min_samples)

    def lengths(self, epoch: int, rows: np.ndarray | int) -> np.ndarray:
        """Compute the lengths (samples, int64) of `rows` after the speed changes in an epoch."""
        return _length(self.n_samples[rows], self.speeds(epoch, rows))

    def length_bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute lower and upper bounds of the `lengths` of `rows` in any epoch, int64."""
        fastest = max(1.0, self.config.speed[1]) if self.config.speed_prob else 1.0
        n_samples = self.n_samples[rows]
        shortest = np.maximum(_length(n_samples, fastest), self.min_samples[rows])
        return shortest, self.config.max_lengths(n_samples)

    def speeds(self, epoch: int, rows: np.ndarray | int) -> np.ndarray:
        """Draw the speed factors of `rows` in an epoch, float64. A factor of 1 means no change.

        If a row would become shorter than its `min_samples`, its speed is reduced until it does not.
        """
        rows = np.asarray(rows)
        if not self.config.speed_prob:
            return np.ones(rows.shape)
        # The position within the range of speeds. Rows whose position is 1 or higher are not changed.
        share = _uniform(self.seed, epoch, rows) / self.config.speed_prob
        low, high = self.config.speed
        drawn = np.round((low + (high - low) * share) * _SPEED_STEPS) / _SPEED_STEPS
        speeds = np.where(share < 1, np.clip(drawn, low, high), 1.0)
        n_samples, min_samples = self.n_samples[rows], self.min_samples[rows]
        highest = n_samples * _SPEED_STEPS // min_samples / _SPEED_STEPS
        return np.where(_length(n_samples, speeds) < min_samples, highest, speeds)

    def __call__(self, wav_T: Tensor, epoch: int, row: int) -> Tensor:
        """Apply all effects drawn for a row in an epoch, without modifying `wav_T`.

        Args:
            wav_T: the utterance or a crop of it, float32 (T,).
            epoch: the training epoch.
            row: the manifest row.

        Returns:
            The augmented waveform, float32 (T,). Its length differs only if the speed was changed.
        """
        wave_T = change_speed(wav_T.numpy(), float(self.speeds(epoch, row)))
        for number, effect in enumerate(EFFECTS[1:]):
            rng = seeded_rng(self.seed, epoch, row, 5, number)  # each effect has its own generator
            if rng.random() < getattr(self.config, f"{effect}_prob"):
                wave_T = self._apply(effect, wave_T, row, rng)
        return torch.from_numpy(wave_T)

    def _apply(self, effect: str, wave_T: np.ndarray, row: int, rng: np.random.Generator) -> np.ndarray:
        config = self.config
        match effect:
            case "reverb":
                response = room_response(
                    rng.uniform(*config.reverb_seconds), rng.uniform(*config.reverb_direct_db), rng
                )
                return filter_with(wave_T, response)
            case "mix":
                return add_at(
                    wave_T, self._other_speech(row, len(wave_T), rng), rng.uniform(*config.mix_snr_db)
                )
            case "noise":
                noise_T = colored_noise(len(wave_T), rng.uniform(*config.noise_tilt), rng)
                return add_at(wave_T, noise_T, rng.uniform(*config.noise_snr_db))
            case "band":
                return limit_band(wave_T, rng.uniform(*config.band_low_hz), rng.uniform(*config.band_high_hz))
            case "codec":
                return quantize_mu_law(wave_T, int(rng.integers(*config.codec_bits, endpoint=True)))
        gain = np.float32(10 ** (rng.uniform(*config.gain_db) / 20))
        clipped_T: np.ndarray = np.clip(wave_T * gain, -1.0, 1.0)
        return clipped_T

    def _other_speech(self, row: int, n_samples: int, rng: np.random.Generator) -> np.ndarray:
        """Add up parts of other utterances at random times (WavLM, section III-B), float32 (T,)."""
        total = np.zeros(n_samples, np.float32)
        for _ in range(int(rng.integers(1, _MAX_OTHERS, endpoint=True))):
            other = int(self.rows[rng.integers(len(self.rows))])
            length = int(min(n_samples * rng.uniform(0.1, 0.5), self.n_samples[other]))
            first = int(rng.integers(self.n_samples[other] - length + 1))
            start = int(rng.integers(n_samples - length + 1))
            if other != row and length:
                total[start : start + length] += self.read(other, first, length).numpy()
        return total


def change_speed(wave_T: np.ndarray, speed: float) -> np.ndarray:
    """Resample a waveform so that it is faster or slower, which also changes its pitch."""
    if speed == 1.0:
        return wave_T
    n_samples = int(_length(len(wave_T), speed))
    resampled = soxr.resample(wave_T, SAMPLE_RATE * speed, SAMPLE_RATE)[:n_samples]
    return np.pad(resampled, (0, n_samples - len(resampled)))  # soxr may round the length differently


def room_response(seconds: float, direct_db: float, rng: np.random.Generator) -> np.ndarray:
    """Generate a room impulse response: direct sound followed by decaying noise (Polack's model).

    The direct sound has amplitude 1 and no delay, so that labels stay aligned.

    Args:
        seconds: reverberation time, during which the reverberation decays by 60 dB.
        direct_db: energy of the direct sound relative to the reverberation.
        rng: generator for the noise, and for a delay of 1 to 20 ms before the first reflection.

    Returns:
        The impulse response, float32 (T,).
    """
    n_samples = max(2, round(seconds * SAMPLE_RATE))
    first = min(n_samples - 1, int(rng.uniform(0.001, 0.02) * SAMPLE_RATE))
    decay = np.float32(10) ** (np.arange(n_samples, dtype=np.float32) * np.float32(-3 / n_samples))
    response: np.ndarray = rng.standard_normal(n_samples, dtype=np.float32) * decay
    response[:first] = 0
    response *= np.float32(10 ** (-direct_db / 20)) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    return response


def filter_with(wave_T: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve a waveform with an impulse response, preserving length and power; float32 (T,)."""
    size = _fft_size(len(wave_T) + len(response) - 1)
    spectrum = np.fft.rfft(wave_T, size) * np.fft.rfft(response, size)
    result: np.ndarray = np.fft.irfft(spectrum, size)[: len(wave_T)].astype(np.float32)
    result *= np.float32(np.sqrt(_power(wave_T) / max(_power(result), _MIN_POWER)))
    return result


def colored_noise(n_samples: int, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """Generate Gaussian noise whose power is proportional to frequency ** -tilt, float32 (T,)."""
    size = _fft_size(n_samples)
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum *= np.arange(1, len(spectrum) + 1, dtype=np.float32) ** np.float32(-tilt / 2)
    return np.fft.irfft(spectrum, size)[:n_samples].astype(np.float32)


def add_at(wave_T: np.ndarray, noise_T: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise or speech, unless it is silent, at a given signal-to-noise ratio; float32 (T,)."""
    power = _power(noise_T)
    if power < _MIN_POWER:
        return wave_T
    mixed_T: np.ndarray = wave_T + noise_T * np.float32(
        np.sqrt(_power(wave_T) / power) * 10 ** (-snr_db / 20)
    )
    return mixed_T


def limit_band(wave_T: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """Apply a zero-delay band-pass filter with slopes of 24 dB (low) and 48 dB (high) per octave."""
    size = _fft_size(len(wave_T))
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    hertz[0] = hertz[1]  # avoids a division by zero
    gain = 1 / np.sqrt((1 + (low_hz / hertz) ** 8) * (1 + (hertz / high_hz) ** 16))
    return np.fft.irfft(np.fft.rfft(wave_T, size) * gain, size)[: len(wave_T)].astype(np.float32)


def quantize_mu_law(wave_T: np.ndarray, bits: int) -> np.ndarray:
    """Quantize a waveform with the mu-law relative to its peak, and decode it again; float32 (T,)."""
    peak = np.abs(wave_T).max(initial=0.0)
    if peak**2 < _MIN_POWER:
        return wave_T
    levels = 2 ** (bits - 1)
    coded = np.round(np.log1p(np.abs(wave_T) * (_MU / peak)) * (levels / np.log1p(_MU))) / levels
    decoded: np.ndarray = np.copysign(np.expm1(coded * np.log1p(_MU)) * (peak / _MU), wave_T)
    return decoded.astype(np.float32)


def _length(n_samples: Any, speed: Any) -> np.ndarray:
    """Return the length (samples, int64) of `n_samples` samples after a speed change."""
    length: np.ndarray = np.rint(n_samples / speed)
    return length.astype(np.int64)


def _uniform(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Draw one number in [0, 1) per row, determined by (seed, epoch, row), with SplitMix64."""
    base = seeded_rng(seed, epoch, 6).integers(2**63, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = base + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    uniform: np.ndarray = (state >> np.uint64(11)) * 2.0**-53
    return uniform


def _fft_size(n_samples: int) -> int:
    return -(-n_samples // _FFT_BLOCK) * _FFT_BLOCK


def _power(wave_T: np.ndarray) -> float:
    return float(np.mean(np.square(wave_T))) if len(wave_T) else 0.0
