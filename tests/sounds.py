"""Sound for the tests: what moves like speech, and what nobody says."""

from __future__ import annotations

import numpy as np
import torch


def syllables(seconds: float, seed: int = 0) -> torch.Tensor:
    """What moves like speech: half a dozen bursts a second, each with a spectrum of its own."""
    rng = np.random.default_rng(seed)
    parts = []
    while sum(map(len, parts)) < seconds * 16_000:
        n = int(rng.uniform(0.1, 0.2) * 16_000)
        spectrum = np.fft.rfft(rng.standard_normal(n))
        hz = np.fft.rfftfreq(n, 1 / 16_000)
        shape = sum(np.exp(-(((hz - rng.uniform(200, 4000)) / 300) ** 2)) for _ in range(3))
        parts.append(np.fft.irfft(spectrum * shape, n) * np.hanning(n))
    wav = np.concatenate(parts)[: round(seconds * 16_000)]
    return torch.from_numpy((0.1 * wav / np.abs(wav).max()).astype(np.float32))


def nobody(kind: str, seconds: float = 8.0) -> torch.Tensor:
    """Sound without speech."""
    rng, n = np.random.default_rng(3), round(seconds * 16_000)
    time = np.arange(n) / 16_000
    pink = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) / np.sqrt(1 + np.arange(n // 2 + 1)), n)
    notes = 220 * 2 ** (rng.integers(0, 24, 64) / 12)
    tone = np.concatenate([np.sin(2 * np.pi * hz * time[:4000]) for hz in notes])
    wav = {
        "digital silence": np.zeros(n),
        "a quiet room": 3e-4 * rng.standard_normal(n),
        "white noise": 0.05 * rng.standard_normal(n),
        "pink noise": 0.05 * pink / pink.std(),
        "noise that begins and ends": 0.05 * rng.standard_normal(n) * ((time > 2) & (time < 5)),
        "mains hum": 0.1 * np.sin(2 * np.pi * 50 * time) + 1e-3 * rng.standard_normal(n),
        "a chord": 0.05 * sum(np.sin(2 * np.pi * hz * time) for hz in (220, 277, 330)),
        "a sweep": 0.2 * np.sin(2 * np.pi * (200 * time + 100 * time**2)),
        "a melody": 0.2 * np.resize(tone, n) * np.abs(np.sin(np.pi * 4 * time)),
        "clicks": 0.5 * (rng.random(n) < 3e-4),
    }[kind]
    return torch.from_numpy(wav.astype(np.float32))


SOUNDS = (
    "digital silence", "a quiet room", "white noise", "pink noise", "noise that begins and ends", "mains hum",
    "a chord", "a sweep", "a melody", "clicks",
)  # fmt: skip
