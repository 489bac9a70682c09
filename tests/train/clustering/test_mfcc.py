"""Tests of MFCCs against a slow reference implementation, and of HuBERT layers against the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jahubert.errors import ConfigError
from jahubert.frames import HUBERT, MFCC
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.clustering.features import HubertLayer, Mfcc, deltas


def speech_like(n: int, seed: int) -> torch.Tensor:
    """Return harmonics with a moving envelope, noise, an offset, and a silent section."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 16_000
    tone = sum(np.sin(2 * np.pi * 120 * k * t + rng.uniform(0, 6)) / k for k in range(1, 30))
    wav = 0.1 * tone * (1 + np.sin(2 * np.pi * 3 * t)) + 0.003 * rng.standard_normal(n) + 0.01
    wav[n // 3 : n // 3 + 1000] = 0.01
    return torch.from_numpy(wav.astype(np.float32))


def slow_mfcc(wav: np.ndarray) -> np.ndarray:
    """Compute Kaldi's MFCCs in float64, one frame and filter at a time, as a reference."""
    wav = wav.astype(np.float64)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    mel = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 25)
    rows = []
    for start in range(0, len(wav) - 399, 160):
        frame = wav[start : start + 400]
        frame = frame - frame.mean()
        before = np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.fft((frame - 0.97 * before) * window, 512)) ** 2
        energies = np.zeros(23)
        for m in range(23):
            left, center, right = edges[m : m + 3]
            for k in range(256):
                at = mel(k * 16000 / 512)
                weight = min((at - left) / (center - left), (right - at) / (right - center))
                energies[m] += max(0.0, weight) * power[k]
        logs = np.log(np.maximum(energies, 2.0**-23))
        row = []
        for c in range(13):
            scale = np.sqrt((1 if c == 0 else 2) / 23)
            dct = scale * sum(logs[m] * np.cos(np.pi * c * (m + 0.5) / 23) for m in range(23))
            row.append(dct * (1 + 11 * np.sin(np.pi * c / 22)))
        rows.append(row)
    return np.array(rows)


def slow_deltas(x: np.ndarray) -> np.ndarray:
    last = len(x) - 1
    at = lambda s: x[min(max(s, 0), last)]  # noqa: E731
    return np.array([sum(k * (at(s + k) - at(s - k)) for k in (1, 2)) / 10 for s in range(len(x))])


def test_mfcc_equals_the_slow_reference():
    wav_T = speech_like(8000, 0)
    static = slow_mfcc(wav_T.numpy())
    delta = slow_deltas(static)
    expected = np.concatenate([static, delta, slow_deltas(delta)], axis=1)
    (actual,) = Mfcc()([wav_T])
    assert actual.shape == (MFCC.n_frames(8000), 39)
    assert actual.dtype == torch.float32
    # The tolerance covers float32 rounding in quiet frames, where feature values reach 90.
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-3)
    assert np.sqrt(np.mean((actual.numpy() - expected) ** 2)) < 1e-4


def test_silence_reaches_the_floor_of_the_logarithm():
    (actual,) = Mfcc()([torch.zeros(1600)])
    np.testing.assert_allclose(actual[:, 0].numpy(), np.log(2.0**-23) * np.sqrt(23), rtol=1e-5)
    assert actual[:, 1:].abs().max() < 1e-3
    (offset,) = Mfcc()([torch.full((1600,), 0.5)])  # a constant is silent, because the mean is subtracted
    torch.testing.assert_close(offset, actual, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 399, 400, 559, 560, 1040, 90_000])
def test_number_of_frames_follows_the_frame_grid(n):
    (actual,) = Mfcc()([speech_like(90_000, 1)[:n]])
    assert actual.shape == (MFCC.n_frames(n), 39)
    assert actual.isfinite().all()
    assert (n < 400) == (len(actual) == 0)


def test_mfcc_is_independent_of_the_batch_and_of_blocks():
    wavs = [speech_like(n, n) for n in (5000, 16_000, 700, 64_000, 100)]
    together = Mfcc()(wavs)
    for wav_T, features in zip(wavs, together, strict=True):
        assert torch.equal(Mfcc()([wav_T])[0], features)
    long = speech_like(160_000, 3)
    shifted = Mfcc()([long[160 * 37 :]])[0]
    torch.testing.assert_close(Mfcc()([long])[0][37 + 4 :, :], shifted[4:], atol=2e-3, rtol=0)


def test_every_second_mfcc_frame_is_a_hubert_frame():
    assert HUBERT.hop_ratio(Mfcc.grid) == 2


def test_deltas_of_a_ramp_are_its_slope():
    ramp = torch.arange(20.0)[:, None] * torch.tensor([[1.0, -3.0]])
    torch.testing.assert_close(deltas(ramp)[2:-2], torch.tensor([[1.0, -3.0]]).expand(16, 2))
    assert deltas(torch.ones(1, 5)).abs().max() == 0


@pytest.fixture(scope="module")
def model() -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(HubertConfig.base(width=48, layers=3, heads=4, ffn=64))


def test_layer_equals_the_model_for_every_batch(model):
    feature = HubertLayer(model.train(), layer=2)
    assert (feature.dim, feature.grid, feature.name) == (48, model.config.grid, "hubert")
    wavs = [speech_like(n, n) for n in (4000, 300, 9000, 400)]
    together = feature(wavs)
    assert not model.training
    assert [tuple(x.shape) for x in together] == [(HUBERT.n_frames(len(w)), 48) for w in wavs]
    for i in (0, 2, 3):
        with torch.no_grad():
            single = model(wavs[i][None], last_layer=2).hidden_BSD[0]
        torch.testing.assert_close(together[i], single, atol=1e-5, rtol=1e-5)
        assert not together[i].requires_grad
    assert [len(x) for x in feature([wavs[1]])] == [0]
    assert feature([]) == []


def test_layer_in_bfloat16_is_close_to_float32(model):
    wavs = [speech_like(n, n) for n in (4000, 300, 9000)]
    exact, lower = (HubertLayer(model, layer=2, precision=precision)(wavs) for precision in ("fp32", "bf16"))
    for expected, actual in zip(exact, lower, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
    expected, actual = torch.cat(exact), torch.cat(lower)
    assert 1e-3 < float((actual - expected).norm() / expected.norm()) < 0.05
    assert not torch.is_autocast_enabled("cpu")


def test_missing_layer_is_rejected(model):
    for layer in (0, 4):
        with pytest.raises(ConfigError, match=r"layer is \d"):
            HubertLayer(model, layer)
