"""Recording level and background noise for synthetic speech."""

from __future__ import annotations

import numpy as np


def add_noise(wave_T: np.ndarray, *, level_db: float, snr_db: float, tilt: float, seed: int) -> np.ndarray:
    """Scale speech to a given level, and add stationary noise.

    Args:
        wave_T: speech, float32 (T,).
        level_db: RMS level of the speech (dBFS).
        snr_db: signal-to-noise ratio (dB).
        tilt: spectral slope of the noise; 0 is white, 1 is pink.
        seed: random seed for the noise.

    Returns:
        The mixture, int16 (T,), scaled down if its peak would exceed 0.99 of full scale.
    """
    wave_T = wave_T * np.float32(10 ** (level_db / 20) / np.sqrt(np.mean(wave_T**2)))
    n = len(wave_T)
    noise = np.fft.rfft(np.random.default_rng(seed).standard_normal(n, dtype=np.float32))
    noise /= np.arange(1, len(noise) + 1, dtype=np.float32) ** (tilt / 2)
    noise_T = np.fft.irfft(noise, n)
    wave_T = wave_T + noise_T * (10 ** ((level_db - snr_db) / 20) / np.sqrt(np.mean(noise_T**2)))
    peak = np.abs(wave_T).max()
    return np.round(wave_T * (32767 * min(1.0, 0.99 / peak))).astype(np.int16)
