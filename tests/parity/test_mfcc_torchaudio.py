"""Tests that the MFCCs equal torchaudio's, which equal Kaldi's.

torchaudio computes its DCT table in float32, and the lifter magnifies the rounding errors in the table: near
the floor of the logarithm (-16), the last cepstra have an error of 1.6e-4. The MFCCs are therefore compared
twice: with the original table, and with an exact table and float64 samples, where only the rounding errors of
this package remain.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jahubert.frames import MFCC
from jahubert.train.clustering.features import Mfcc

LENGTHS = [400, 401, 559, 560, 719, 720, 4_000, 16_000, 41_123, 160_007]


def speech_like(n_samples: int, seed: int) -> Tensor:
    """Synthesize syllables with formants, gliding pitch, breath noise and pauses."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(n_samples) / 16_000
    pitch = 2 * math.pi * torch.cumsum(120 + 40 * torch.sin(2 * math.pi * 0.7 * time), 0) / 16_000
    voice = sum(math.exp(-((k * 140 - 600) ** 2) / 4e5) * torch.sin(k * pitch) for k in range(1, 30))
    syllables = torch.sin(2 * math.pi * 2.5 * time).clamp(min=0)
    return 0.1 * voice * syllables + 0.003 * torch.randn(n_samples, generator=generator)


def noise(n_samples: int, level: float) -> Tensor:
    return level * torch.randn(n_samples, generator=torch.Generator().manual_seed(n_samples))


SIGNALS = {
    "speech": lambda n: speech_like(n, n),
    # Noise is added because filters that contain only the rounding error of the tone differ by 1e-2.
    "tone": lambda n: 0.3 * torch.sin(0.17 * torch.arange(n)) + noise(n, 0.03),
    "tones and an offset": lambda n: (
        0.1 + 0.2 * (torch.sin(0.05 * torch.arange(n)) + torch.sin(1.9 * torch.arange(n))) + noise(n, 0.03)
    ),
    "loud noise": lambda n: noise(n, 1.0).clamp(-1, 1),
    # The amplitude is below one step of 16-bit audio, and the energy of some filters is below the floor of
    # the logarithm.
    "near silence": lambda n: noise(n, 1e-5),
    "fainter noise": lambda n: noise(n, 1e-8),
    "silence": torch.zeros,
    "a click": lambda n: torch.nn.functional.one_hot(torch.tensor(n // 2), n).float(),
}


def wanted(wav_T: Tensor) -> Tensor:
    import torchaudio

    static_SC = torchaudio.compliance.kaldi.mfcc(wav_T[None], sample_frequency=16_000.0, use_energy=False)
    delta_CS = torchaudio.functional.compute_deltas(static_SC.T)
    return torch.cat([static_SC, delta_CS.T, torchaudio.functional.compute_deltas(delta_CS).T], dim=1)


def exact_table(n_mfcc: int, n_mels: int) -> Tensor:
    """Return the orthonormal DCT-II matrix (mels, cepstra)."""
    angle_MC = math.pi / n_mels * torch.outer(torch.arange(n_mels) + 0.5, torch.arange(n_mfcc).double())
    return torch.cos(angle_MC) * torch.tensor([1.0] + [2.0] * (n_mfcc - 1)).double().div(n_mels).sqrt()


@pytest.mark.stack
@pytest.mark.parametrize("kind", SIGNALS)
def test_equals_torchaudio(kind, monkeypatch):
    import torchaudio

    wavs = [SIGNALS[kind](n) for n in LENGTHS]
    ours = Mfcc()(wavs)
    theirs = [wanted(wav_T) for wav_T in wavs]
    monkeypatch.setattr(torchaudio.compliance.kaldi, "_get_dct_matrix", exact_table)
    for got_SC, their_SC, wav_T in zip(ours, theirs, wavs, strict=True):
        exact_SC = wanted(wav_T.double())
        assert got_SC.shape == their_SC.shape == (MFCC.n_frames(len(wav_T)), 39)
        assert (got_SC - exact_SC).abs().max() < 1e-4, len(wav_T)
        difference_SC = got_SC - their_SC
        assert difference_SC.square().mean().sqrt() < 1e-4, len(wav_T)
        assert difference_SC.abs().max() < (1e-3 if kind == "a click" else 2e-4), len(wav_T)
