"""Features and units of tiny random models: against the model, alone and in lists, whole and in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from jahubert.checkpoint import save_bundle
from jahubert.errors import AudioError, CheckpointError, ConfigError
from jahubert.extract import FeatureExtractor, UnitExtractor, chunk_starts, encode_all
from jahubert.frames import HUBERT, FrameGrid
from jahubert.hubert import HubertConfig, HubertModel

TINY = HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=3, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)


@pytest.fixture(scope="module")
def model() -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(TINY).eval()


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("layer", [None, 0, 1, 3])
def test_features_are_those_of_the_layer(model, layer):
    wav = noise(9_000)
    features = FeatureExtractor(model, layer, device="cpu")(wav)
    with torch.no_grad():
        encoded = model(wav[None], keep_layers=(0, 1, 2, 3))
    wanted = encoded.hidden_BSD if layer is None else encoded.layers[layer]
    assert features.dtype == torch.float32 and features.shape == (TINY.grid.n_frames(9_000), 16)
    torch.testing.assert_close(features, wanted[0])


def test_a_list_gives_what_each_gives_alone(model, tmp_path):
    extractor = FeatureExtractor(model, 2, device="cpu")
    soundfile.write(tmp_path / "日本語 名前.wav", noise(5_000, 7).numpy(), 16_000, subtype="FLOAT")
    items = [
        noise(12_345),
        tmp_path / "日本語 名前.wav",
        noise(400, 2).numpy(),
        noise(399),
        str(tmp_path / "日本語 名前.wav"),
    ]
    together = extractor(items)
    assert [len(x) for x in together] == [TINY.grid.n_frames(n) for n in (12_345, 5_000, 400, 399, 5_000)]
    for one, item in zip(together, items, strict=True):
        torch.testing.assert_close(one, extractor(item), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], extractor(noise(5_000, 7)), atol=1e-5, rtol=1e-5)


def test_batches_are_bounded(model, monkeypatch):
    monkeypatch.setattr("jahubert.extract.BATCH_SECONDS", 2.0)
    seen = []

    def encode(wav_BT, n_samples):
        seen.append(tuple(wav_BT.shape))
        encoded = model(wav_BT, n_samples)
        return encoded.hidden_BSD, encoded.n_frames_B

    wavs = [noise(n, n) for n in (16_000, 3_000, 40_000, 16_000, 0, 15_000)]
    found = encode_all(wavs, encode, TINY.grid, 16, None)
    assert [len(x) for x in found] == [TINY.grid.n_frames(len(w)) for w in wavs]
    assert (1, 40_000) in seen and all(b == 1 or b * t <= 32_000 for b, t in seen)


@pytest.mark.parametrize("n_samples", [0, 399, 160_000, 160_001, 257_000, 256_000, 1_000_003])
@pytest.mark.parametrize("grid", [HUBERT, FrameGrid(1000, 300)])
def test_chunks_join_to_the_frames_of_the_whole(n_samples, grid):
    """An encoder whose frame is the place of its first sample: any slip of a chunk shows."""
    wav = torch.arange(n_samples, dtype=torch.float64)

    def encode(wav_BT, n_frames):
        frames = [grid.n_frames(n) for n in n_frames]
        return wav_BT[:, : grid.hop * max(frames) : grid.hop, None], torch.tensor(frames)

    (whole,) = encode_all([wav], encode, grid, 1, None)
    (joined,) = encode_all([wav], encode, grid, 1, 10.0)
    assert whole.shape == (grid.n_frames(n_samples), 1)
    assert torch.equal(joined, whole)
    assert all(start % grid.hop == 0 for start, _ in chunk_starts(n_samples, grid, 10.0))


def test_chunks_have_context_on_both_sides(model):
    """A frame of a long recording is that of a window around it, far from the window's edges."""
    wav = noise(20 * 16_000)
    chunked = FeatureExtractor(model, 1, device="cpu", chunk_seconds=8)(wav)
    whole = FeatureExtractor(model, 1, device="cpu")(wav)
    assert chunked.shape == whole.shape
    assert float((chunked - whole).abs().mean()) < 0.2 * float(whole.std())


def test_units_are_the_nearest_centroids(model, tmp_path):
    centroids = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    save_bundle(tmp_path / "b", model=model, centroids_KD=centroids, centroid_layer=2)
    extractor = UnitExtractor.from_pretrained(tmp_path / "b", device="cpu")
    features = FeatureExtractor.from_pretrained(tmp_path / "b", layer=2, device="cpu")
    wav = noise(20_000)
    units = extractor(wav)
    assert units.dtype == torch.int64 and extractor.n_units == 20
    assert torch.equal(units, torch.cdist(features(wav), centroids).argmin(1))
    assert [len(u) for u in extractor([wav, noise(100)])] == [len(units), 0]


def test_what_a_user_can_get_wrong(model, tmp_path):
    save_bundle(tmp_path / "b", model=model)
    with pytest.raises(CheckpointError, match="no centroids"):
        UnitExtractor.from_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"layer 4 .* layers 0 to 3"):
        FeatureExtractor.from_pretrained(tmp_path / "b", layer=4)
    with pytest.raises(ConfigError, match="too short"):
        FeatureExtractor(model, chunk_seconds=2)
    with pytest.raises(ConfigError, match="'teapot'"):
        FeatureExtractor(model, device="teapot")
    with pytest.raises(CheckpointError, match="another model"):
        UnitExtractor(FeatureExtractor(model, 1, device="cpu"), torch.zeros(4, 17))
    with pytest.raises(AudioError, match=r"no\.wav"):
        FeatureExtractor(model, device="cpu")(tmp_path / "no.wav")
    with pytest.raises(AudioError):
        FeatureExtractor(model, device="cpu")(np.zeros(0, np.float32))
