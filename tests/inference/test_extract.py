"""Tests of feature and unit extraction with tiny random models: layers, batches, chunks and streams."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from jahubert.audio import AudioSource, load_audio
from jahubert.errors import AudioError, CheckpointError, ConfigError, DataError
from jahubert.formats.bundle import save_bundle
from jahubert.frames import HUBERT, FrameGrid
from jahubert.inference.chunking import chunks, encode_all, encode_stream
from jahubert.inference.features import FeatureExtractor, LayerFeatures, UnitExtractor
from jahubert.inference.reading import prefetch_audio
from jahubert.model.centroids import NearestCentroid
from jahubert.model.device import pick_device
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.prefetch import N_THREADS

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
def test_features_equal_the_layer_output(model, layer):
    wav = noise(9_000)
    features = FeatureExtractor(model, layer, device="cpu")(wav)
    with torch.no_grad():
        encoded = model(wav[None], keep_layers=(0, 1, 2, 3))
    expected = encoded.hidden_BSD if layer is None else encoded.layers[layer]
    assert features.dtype == torch.float32 and features.shape == (TINY.grid.n_frames(9_000), 16)
    torch.testing.assert_close(features, expected[0])


def test_results_do_not_depend_on_the_batch(model, tmp_path):
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
    monkeypatch.setattr("jahubert.inference.chunking.BATCH_SECONDS", 2.0)
    seen = []

    def encode(wav_BT, n_samples):
        seen.append(tuple(wav_BT.shape))
        encoded = model(wav_BT, n_samples)
        return encoded.hidden_BSD, encoded.n_frames_B

    wavs = [noise(n, n) for n in (16_000, 3_000, 40_000, 16_000, 0, 15_000)]
    outputs = encode_all(wavs, encode, TINY.grid, (16,), None)
    assert [len(x) for x in outputs] == [TINY.grid.n_frames(len(w)) for w in wavs]
    assert (1, 40_000) in seen and all(b == 1 or b * t <= 32_000 for b, t in seen)


@pytest.mark.parametrize("n_samples", [0, 399, 160_000, 160_001, 257_000, 256_000, 1_000_003])
@pytest.mark.parametrize("grid", [HUBERT, FrameGrid(1000, 300)])
def test_joined_chunks_equal_the_whole(n_samples, grid):
    """A fake encoder returns the index of the first sample in each frame, which reveals misalignment."""
    wav = torch.arange(n_samples, dtype=torch.float64)

    def encode(wav_BT, n_frames):
        frames = [grid.n_frames(n) for n in n_frames]
        return wav_BT[:, : grid.hop * max(frames) : grid.hop, None], torch.tensor(frames)

    (whole,) = encode_all([wav], encode, grid, (1,), None)
    (joined,) = encode_all([wav], encode, grid, (1,), 10.0)
    streamed = encode_stream(wav.split(70_001), encode, grid, 10.0)
    assert whole.shape == (grid.n_frames(n_samples), 1)
    assert torch.equal(joined, whole)
    assert torch.equal(torch.cat([whole[:0], *streamed]), whole)
    assert all(chunk.start % grid.hop == 0 for chunk in chunks([wav], grid, 10.0))


def test_chunks_have_context_on_both_sides(model):
    """Frames come from the middle of a chunk, where they have context on both sides."""
    wav = noise(20 * 16_000)
    chunked = FeatureExtractor(model, 1, device="cpu", chunk_seconds=8)(wav)
    whole = FeatureExtractor(model, 1, device="cpu")(wav)
    assert chunked.shape == whole.shape
    assert float((chunked - whole).abs().mean()) < 0.2 * float(whole.std())


def test_several_layers_are_stacked_or_summed(model):
    wavs = [noise(9_000), noise(399), noise(6_000, 1)]
    single = [FeatureExtractor(model, number, device="cpu")(wavs) for number in (1, 3)]
    both = FeatureExtractor(model, [1, 3], device="cpu")(wavs)
    summed = FeatureExtractor(model, [1, 3], weights=[0.25, -2.0], device="cpu")(wavs)
    for one, three, pair, total in zip(*single, both, summed, strict=True):
        assert pair.shape == (len(one), 2, 16) and total.shape == one.shape
        torch.testing.assert_close(pair, torch.stack([one, three], dim=1))
        torch.testing.assert_close(total, 0.25 * one - 2 * three)
    assert FeatureExtractor(model, "all", device="cpu")(wavs[0]).shape[1:] == (4, 16)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (np.int64(3), 3),
        ([np.int64(1), np.int32(2)], [1, 2]),
        (np.arange(2), [0, 1]),
        (torch.arange(2), [0, 1]),
        (range(1, 3), [1, 2]),
    ],
    ids=repr,
)
def test_layers_may_be_integers_of_numpy_and_torch(model, layer, expected):
    wav = noise(4_000)
    features = FeatureExtractor(model, layer, device="cpu")(wav)
    torch.testing.assert_close(features, FeatureExtractor(model, expected, device="cpu")(wav))


@pytest.mark.parametrize("layer", ["3", True, [1, True], 1.0, [1.5], -1, np.int64(4), ["1"]], ids=repr)
def test_invalid_layers_are_rejected(model, layer):
    with pytest.raises(ConfigError, match=r"layer .*0 to 3"):
        LayerFeatures(model, layer)


def test_layer_features_is_trainable(model):
    """Gradients reach the layer weights and the encoder up to the highest requested layer."""
    torch.manual_seed(0)
    encoder = HubertModel(TINY)
    module = LayerFeatures(encoder, [0, 2], weights="learn")
    features_BSD, n_frames_B = module(torch.stack([noise(6_000), noise(6_000, 1)]), [6_000, 2_000])
    assert n_frames_B.tolist() == [TINY.grid.n_frames(6_000), TINY.grid.n_frames(2_000)]
    assert not features_BSD[1, n_frames_B[1] :].any()
    features_BSD.pow(2).sum().backward()
    assert module.mix_L is not None and module.mix_L.grad is not None and module.mix_L.grad.abs().sum() > 0
    assert encoder.encoder.layers[1].attention.q_proj.weight.grad is not None
    assert encoder.encoder.layers[2].attention.q_proj.weight.grad is None  # layer 3 is not computed
    weights_L = module.weights_L
    assert weights_L is not None and weights_L.tolist() == [0.5, 0.5]
    encoder.eval()
    frozen = FeatureExtractor(encoder, [0, 2], weights=weights_L.tolist(), device="cpu")
    with torch.no_grad():
        learned = module(noise(6_000)[None])[0][0]
    torch.testing.assert_close(frozen(noise(6_000)), learned)
    assert not frozen(noise(6_000)).requires_grad


def test_times_are_the_centers_of_the_frames(model):
    extractor = FeatureExtractor(model, 1, device="cpu")
    times = extractor.times(3)
    assert times.tolist() == [0.0125, 0.0325, 0.0525] and len(extractor.times(0)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close(model, dtype):
    wav = noise(9_000)
    exact = FeatureExtractor(model, 2, device="cpu")(wav)
    near = FeatureExtractor(model, 2, device="cpu", dtype=dtype)(wav)
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    assert float((near - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.bfloat16),
    ],
)
def test_autocast_of_a_model_of_another_dtype_is_rejected(model, own, dtype):
    with pytest.raises(ConfigError, match=str(own)):
        FeatureExtractor(copy.deepcopy(model).to(own), device="cpu", dtype=dtype)


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_return_float32_features(model, own):
    extractor = FeatureExtractor(copy.deepcopy(model).to(own), device="cpu")
    assert extractor(noise(4_000)).dtype == torch.float32


def test_many_preserves_order_and_reports_errors_in_place(model, tmp_path):
    extractor = FeatureExtractor(model, 1, device="cpu")
    items = [noise(500 * (1 + n % 7), n) for n in range(80)]
    items[5:5] = [tmp_path / "missing.wav"]
    items.append(tmp_path / "missing too.wav")
    outputs = list(extractor.many(items, batch_seconds=1.0, errors="return"))
    assert len(outputs) == len(items)
    for item, features in zip(items, outputs, strict=True):
        if isinstance(item, torch.Tensor):
            torch.testing.assert_close(features, extractor(item), atol=1e-5, rtol=1e-5)
        else:
            assert isinstance(features, AudioError) and item.name in str(features)
    with pytest.raises(AudioError, match=r"missing\.wav"):
        list(extractor.many(items))


@pytest.mark.parametrize(
    "wav",
    [
        noise(4_000)[None],
        noise(8_000).reshape(2, -1),
        torch.tensor(0.5),
        (noise(4_000) * 1_000).to(torch.int16),
        noise(4_000).numpy(),
        torch.full((4_000,), torch.nan),
        torch.cat([noise(4_000), torch.tensor([-torch.inf])]),
    ],
    ids=["(1, T)", "(2, T)", "scalar", "int16", "numpy", "nan", "inf"],
)
def test_encode_rejects_what_is_not_a_waveform(model, wav):
    with pytest.raises(AudioError, match="waveform 1"):
        FeatureExtractor(model, 1, device="cpu").encode([noise(4_000), wav])


def test_encode_accepts_waveforms_that_require_gradients(model):
    extractor = FeatureExtractor(model, 1, device="cpu")
    (features,) = extractor.encode([noise(4_000).requires_grad_(True)])
    assert not features.requires_grad
    torch.testing.assert_close(features, extractor(noise(4_000)))


@pytest.mark.parametrize(
    "single",
    [
        "a.wav",
        Path("a.wav"),
        AudioSource("a.wav"),
        io.BytesIO(b"RIFF"),
        noise(8_000).reshape(2, -1),
        noise(8_000).numpy(),
        [0.1, 0.2],
        (16_000, noise(4_000)),
        (noise(4_000), 16_000),
        {"array": noise(4_000), "sampling_rate": 16_000},
    ],
    ids=lambda value: type(value).__name__,
)
def test_many_rejects_a_single_recording(model, single):
    extractor = FeatureExtractor(model, 1, device="cpu")
    with pytest.raises(AudioError, match="list of recordings"):
        extractor.many(single, errors="return")


def test_many_accepts_arrays_of_paths(model, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(4_000).numpy(), 16_000)
    paths = np.array([str(tmp_path / "a.wav")] * 2)
    assert len(list(FeatureExtractor(model, 1, device="cpu").many(paths))) == 2


def test_many_rejects_unknown_values_of_errors(model):
    with pytest.raises(ConfigError, match="'ignore'"):
        FeatureExtractor(model, 1, device="cpu").many([noise(4_000)], errors="ignore")


@pytest.mark.parametrize("pair", [(noise(4_000), 16_000), (noise(4_000).numpy(), 22_050.0)])
def test_samples_before_their_rate_are_rejected(model, pair):
    with pytest.raises(AudioError, match=r"tuple \(array, rate\)"):
        FeatureExtractor(model, 1, device="cpu")(pair)


def test_encoding_errors_are_returned_for_the_recordings_that_cause_them(model, monkeypatch):
    """The recordings of a failed batch are encoded again one by one, and later recordings are unaffected."""
    extractor = FeatureExtractor(model, 1, device="cpu")
    encode = extractor.encode

    def failing(wavs):
        if any(len(wav) == 9_000 for wav in wavs):
            raise MemoryError("too long")
        return encode(wavs)

    monkeypatch.setattr(extractor, "encode", failing)
    wavs = [noise(n) for n in (5_000, 9_000, 6_000, 9_000, 7_000)]
    for seconds in (0.1, 1.0, 60.0):
        outputs = list(extractor.many(wavs, batch_seconds=seconds, errors="return"))
        assert [isinstance(output, MemoryError) for output in outputs] == [False, True, False, True, False]
        for wav, output in zip(wavs, outputs, strict=True):
            if len(wav) != 9_000:
                torch.testing.assert_close(output, encode([wav])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(MemoryError):
        list(extractor.many(wavs))


def test_streams_are_read_when_they_are_reached():
    """A stream may block, and several streams may read from the same source."""
    read = []

    class Stream(io.BytesIO):
        def read(self, *size):
            read.append((self, threading.current_thread()))
            return super().read(*size)

    buffer = io.BytesIO()
    soundfile.write(buffer, noise(800).numpy(), 16_000, format="WAV", subtype="FLOAT")
    streams = [Stream(buffer.getvalue()) for _ in range(3)]
    for stream, (_, wav) in zip(streams, prefetch_audio(streams), strict=True):
        torch.testing.assert_close(wav, noise(800))
        assert {reader for reader, _ in read} == {stream}
        assert {thread for _, thread in read} == {threading.current_thread()}
        read.clear()


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_fifos_are_opened_when_they_are_reached(tmp_path, monkeypatch):
    """Opening a FIFO blocks until it has a writer, and only the main thread can be interrupted."""
    fifo, link, plain = tmp_path / "fifo", tmp_path / "link", tmp_path / "plain.wav"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    plain.touch()
    thread_of = {}

    def load(item, _):
        thread_of[item] = threading.current_thread()
        return noise(400)

    monkeypatch.setattr("jahubert.inference.reading.load_audio", load)
    blocking = [fifo, str(fifo), link, AudioSource(str(fifo))]
    others = [plain, AudioSource(str(plain)), tmp_path / "missing", "a\0.wav"]
    assert [item for item, _ in prefetch_audio(blocking + others)] == blocking + others
    assert {thread_of[item] for item in blocking} == {threading.current_thread()}
    assert threading.current_thread() not in {thread_of[item] for item in others}


def test_prefetching_is_bounded(monkeypatch):
    monkeypatch.setattr("jahubert.inference.reading.PREFETCH", 4)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield noise(400)

    stream = prefetch_audio(endless())
    for _ in range(10):
        next(stream)
    assert taken <= 14
    stream.close()


def test_decoded_audio_that_waits_is_bounded(model, monkeypatch):
    """While a recording is encoded, only a limited amount of audio is read ahead. Results remain in order."""
    monkeypatch.setattr("jahubert.inference.reading.MAX_SAMPLES", 16_000)
    extractor = FeatureExtractor(model, device="cpu")
    wavs = [noise(8_000 + 400 * i, i) for i in range(20)]
    expected = extractor(wavs)
    read = []

    def load(item, rate):
        read.append(item)
        return load_audio(item, rate)

    monkeypatch.setattr("jahubert.inference.reading.load_audio", load)
    for i, features in enumerate(extractor.many(wavs, batch_seconds=0.1)):
        time.sleep(0.01)
        assert len(read) <= i + 1 + 2 + N_THREADS
        torch.testing.assert_close(features, expected[i])
    assert len(read) == len(wavs)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_stream_equals_chunked_features(model, tmp_path, rate):
    path = tmp_path / "long.flac"
    soundfile.write(path, noise(21 * rate).numpy(), rate)
    extractor = FeatureExtractor(model, [1, 2], device="cpu", chunk_seconds=8)
    pieces = list(extractor.stream(path))
    assert len(pieces) == 5
    torch.testing.assert_close(torch.cat(pieces), extractor(path), atol=1e-5, rtol=1e-5)
    assert list(extractor.stream(noise(100))) == []


def test_memory_does_not_grow_with_the_recording(model, tmp_path):
    """The test compares the peak memory of two processes that stream 2 and 20 minutes of audio."""
    save_bundle(tmp_path / "b", model=model)
    code = """
import sys, jahubert
extractor = jahubert.FeatureExtractor.from_pretrained(sys.argv[1], 1, device="cpu", chunk_seconds=10)
frames = sum(len(piece) for piece in extractor.stream(sys.argv[2]))
print(frames, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peaks = []
    for minutes in (2, 20):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.tile(noise(16_000).numpy(), 60 * minutes), 16_000)  # at most 39 MB
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "b", path], capture_output=True, text=True, check=True
        )
        frames, peak = map(int, done.stdout.split())
        assert frames == HUBERT.n_frames(60 * minutes * 16_000)
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 20, peaks  # in MB; storing all samples would add 69 MB


def test_input_of_the_first_block_does_not_depend_on_chunks():
    """The layers before the first block depend on a few frames. Only attention depends on the whole chunk.

    The positional convolution depends on 64 frames on each side, less than half the overlap of two chunks.
    """
    torch.manual_seed(0)
    config = HubertConfig(
        conv_dims=(8,) * 7,
        width=16,
        layers=2,
        heads=2,
        ffn=32,
        pos_conv_groups=2,
        conv_norm="layer",
        pre_norm=True,
    )
    encoder, wav = HubertModel(config), noise(30 * 16_000)
    whole = FeatureExtractor(encoder, "all", device="cpu")(wav)
    chunked = FeatureExtractor(encoder, "all", device="cpu", chunk_seconds=10)(wav)
    torch.testing.assert_close(chunked[:, 0], whole[:, 0], atol=1e-5, rtol=1e-5)
    assert float((chunked[:, 1] - whole[:, 1]).abs().max()) > 1e-4


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
    assert [len(u) for u in extractor.many([wav, noise(100)])] == [len(units), 0]


def test_units_of_features_in_several_threads(model):
    centroids_KD = torch.randn(20, 16)
    extractor = UnitExtractor(FeatureExtractor(model, 1, device="cpu"), centroids_KD)
    features = [torch.randn(n, 16) for n in (0, 1, 900, 1100, 5000)] * 4
    expected = [NearestCentroid(centroids_KD).labels(frames_SD) for frames_SD in features]
    with ThreadPoolExecutor(4) as threads:
        units = list(threads.map(extractor.nearest, features))
    assert all(torch.equal(a, b) for a, b in zip(units, expected, strict=True))
    with pytest.raises(DataError, match="17 dimensions"):
        extractor.nearest(torch.zeros(3, 17))


def test_invalid_arguments_are_rejected(model, tmp_path):
    save_bundle(tmp_path / "b", model=model)
    with pytest.raises(CheckpointError, match="no centroids"):
        UnitExtractor.from_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"layer 4 .*0 to 3"):
        FeatureExtractor.from_pretrained(tmp_path / "b", layer=4)
    for layer, weights, message in (
        ([1, 4], None, "layer 4"),
        ([], None, "empty list"),
        (2, [1.0], "several layers"),
        ([1, 2], [1.0], r"\(1 and 2\); give one weight per layer"),
        ([1, 2], "teach", "'teach'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LayerFeatures(model, layer, weights)
    with pytest.raises(ConfigError, match="float64"):
        FeatureExtractor(model, dtype=torch.float64)
    with pytest.raises(ConfigError, match="too short"):
        FeatureExtractor(model, chunk_seconds=2)
    with pytest.raises(ConfigError, match="device=teapot"):
        FeatureExtractor(model, device="teapot")
    with pytest.raises(CheckpointError, match="another model"):
        UnitExtractor(FeatureExtractor(model, 1, device="cpu"), torch.zeros(4, 17))
    with pytest.raises(AudioError, match=r"no\.wav"):
        FeatureExtractor(model, device="cpu")(tmp_path / "no.wav")
    with pytest.raises(AudioError):
        FeatureExtractor(model, device="cpu")(np.zeros(0, np.float32))


def test_device_names_are_resolved_or_rejected(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu") and pick_device(torch.device("cpu")).type == "cpu"
    for name in ("teapot", "cuda:7", "cuda"):
        with pytest.raises(ConfigError, match=name):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="cuda:2"):
        pick_device("cuda:2")
