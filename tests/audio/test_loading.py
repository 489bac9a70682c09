"""Tests of loading audio from files, byte ranges, streams and arrays, and of rejecting broken input."""

from __future__ import annotations

import io
import os
import struct
import tarfile

import numpy as np
import pytest
import soundfile
import soxr
import torch

from jahubert.audio import AudioSource, audio_length, is_recording, is_seekable, load_audio, stream_audio
from jahubert.errors import AudioError

RNG = np.random.default_rng(7)
NOISE = (RNG.standard_normal(32_000) * 0.1).astype(np.float32)


def encode(samples, rate=16_000, fmt="WAV", subtype=None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=fmt, subtype=subtype)
    return out.getvalue()


def test_float_wav_with_a_japanese_name_is_exact(tmp_path):
    path = tmp_path / "日本語 名前.wav"
    path.write_bytes(encode(NOISE, subtype="FLOAT"))
    for source in (path, str(path), AudioSource(str(path)), path.open("rb"), io.BytesIO(path.read_bytes())):
        wav_T = load_audio(source)
        assert wav_T.dtype == torch.float32
        assert torch.equal(wav_T, torch.from_numpy(NOISE))
    assert audio_length(path) == 32_000


@pytest.mark.parametrize("fmt", ["WAV", "FLAC", "OGG", "AIFF", "AU", "MP3"])
def test_crops_equal_slices_of_the_whole(tmp_path, fmt):
    path = tmp_path / f"a.{fmt.lower()}"
    path.write_bytes(encode(NOISE, fmt=fmt))
    whole = load_audio(path)
    assert audio_length(path) == len(whole)
    torch.testing.assert_close(
        load_audio(path, start=3201, n_samples=1600), whole[3201:4801], atol=1e-6, rtol=0
    )
    assert len(load_audio(path, start=31_000, n_samples=5000)) == len(whole) - 31_000
    assert len(load_audio(path, start=10, n_samples=0)) == 0
    with pytest.raises(AudioError, match=r"no audio from sample 40000 on"):
        load_audio(path, start=40_000)


@pytest.mark.parametrize(
    ("fmt", "rate", "expected"),
    [
        ("WAV", 16_000, True),
        ("FLAC", 16_000, True),
        ("OGG", 16_000, True),
        ("MP3", 16_000, False),
        ("WAV", 44_100, False),
        ("FLAC", 8_000, False),
    ],
)
def test_seekable_files_are_recognized_by_their_content(tmp_path, fmt, rate, expected):
    path = tmp_path / "a.wav"
    stereo = np.stack([NOISE, NOISE / 2], axis=1)
    for samples in (NOISE, stereo):
        path.write_bytes(encode(samples, rate, fmt))
        assert is_seekable(path) is is_seekable(AudioSource(str(path))) is expected
    path.write_bytes(encode(NOISE, rate, fmt)[:50])
    with pytest.raises(AudioError):
        is_seekable(path)


def test_files_with_several_streams_or_without_a_length_are_not_seekable():
    flac = bytearray(encode(NOISE, fmt="FLAC"))
    flac[21] &= 0xF0  # the number of samples in the header is set to 0, as in a file written to a pipe
    flac[22:26] = bytes(4)
    assert not is_seekable(io.BytesIO(bytes(flac)))
    assert not is_seekable(io.BytesIO(encode(NOISE) * 2))
    assert is_seekable(io.BytesIO(encode(NOISE)))


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000, 16_001])
def test_other_sampling_rates_are_resampled(tmp_path, rate):
    t = np.arange(rate) / rate
    path = tmp_path / "tone.wav"
    path.write_bytes(encode(0.5 * np.sin(2 * np.pi * 440 * t), rate, subtype="FLOAT"))
    wav_T = load_audio(path)
    assert len(wav_T) == audio_length(path) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(wav_T.numpy() - expected)[500:-500].max() < 1e-4
    assert torch.equal(load_audio(path, start=1000, n_samples=99), wav_T[1000:1099])
    assert torch.equal(load_audio((0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), rate), wav_T)


def test_length_is_exact_for_every_length_and_rate():
    rng = np.random.default_rng(0)
    for rate in (7350, 8000, 11_025, 12_000, 16_001, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000):
        for n in [*range(8, 200), *rng.integers(200, 100_000, 10)]:
            samples = np.zeros(n, np.float32)
            soxr_length = len(soxr.resample(samples, rate, 16_000, quality="HQ"))  # an independent reference
            assert audio_length(samples, rate) == soxr_length == len(load_audio(samples, rate)), (rate, n)


def test_channels_that_cancel_each_other_out_are_reported_once(tmp_path, caplog):
    stereo = np.stack([NOISE, -NOISE], axis=1)
    names = [tmp_path / "one.wav", tmp_path / "two.wav"]
    for name in names:
        name.write_bytes(encode(stereo, subtype="FLOAT"))
    assert float(load_audio(names[0]).abs().max()) == 0
    assert len(list(stream_audio(names[1], block_seconds=0.5))) > 1
    for name in names:
        load_audio(name)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all(str(name) in text for name, text in zip(names, messages, strict=True))
    caplog.clear()
    for other in (np.stack([NOISE, NOISE[::-1]], 1), np.stack([NOISE, 0 * NOISE], 1), 1e-4 * stereo):
        load_audio(other)
    assert not caplog.records


def test_stereo_is_averaged_in_either_orientation():
    stereo = np.stack([NOISE, NOISE[::-1]], axis=1)
    expected = torch.from_numpy(stereo.mean(axis=1))
    for source in (stereo, stereo.T, torch.from_numpy(stereo), io.BytesIO(encode(stereo, subtype="FLOAT"))):
        torch.testing.assert_close(load_audio(source), expected)
    assert audio_length(stereo) == audio_length(stereo.T) == 32_000


@pytest.mark.parametrize(
    ("array", "rate"),
    [
        (np.zeros(0, np.float32), None),
        (np.zeros((2, 0), np.float32), None),
        (torch.zeros(0), None),
        (np.zeros(1, np.float32), 48_000),
        (np.zeros((2, 3, 4), np.float32), None),
        (np.zeros((), np.float32), None),
        (np.zeros(8, np.complex64), None),
        (np.zeros(8, np.int64), None),
        (np.zeros(8, bool), None),
        (torch.zeros(8, dtype=torch.complex64), None),
        (torch.zeros(8, dtype=torch.int64), None),
        (torch.zeros(()), None),
        ([], None),
    ],
)
def test_arrays_that_cannot_be_loaded_have_no_length(array, rate):
    for function in (load_audio, audio_length):
        with pytest.raises(AudioError):
            function(array, rate)


def test_length_of_an_array_is_found_without_a_copy():
    """The arrays are views of one sample. Converting them would need 4 TB of memory or more."""
    n = 1_000_000_000_000
    assert audio_length(np.broadcast_to(np.int16(1), (n,)), 32_000) == n // 2
    assert audio_length(np.broadcast_to(np.float64(0.5), (2, n))) == n
    assert audio_length(torch.zeros(1, dtype=torch.bfloat16).expand(n)) == n


def test_array_types_are_scaled_by_their_full_scale():
    half = {np.int16: 2**14, np.int32: 2**30, np.uint8: 192, np.int8: 64, np.float64: 0.5, np.float16: 0.5}
    for dtype, value in half.items():
        for order in "<>":
            array = np.full(10, value, np.dtype(dtype).newbyteorder(order))
            assert load_audio(array).tolist() == [0.5] * 10
    assert load_audio(torch.full((10,), 0.5, dtype=torch.bfloat16, requires_grad=True)).tolist() == [0.5] * 10
    for wrong in (np.zeros(5, np.int64), np.zeros(5, complex), np.zeros((2, 2, 2), np.float32)):
        with pytest.raises(AudioError, match="audio arrays"):
            load_audio(wrong)


def test_argument_is_not_modified():
    array = NOISE.copy()
    load_audio(array).mul_(0)
    assert np.array_equal(array, NOISE)


def test_byte_range_inside_a_tar_is_read(tmp_path):
    path = tmp_path / "shard 一.tar"
    members = {
        "あ.wav": encode(NOISE),
        "い.flac": encode(NOISE[:7000], fmt="FLAC"),
        "u.ogg": encode(NOISE, fmt="OGG"),
    }
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        for member in tar:
            source = AudioSource(str(path), member.offset_data, member.size)
            expected = load_audio(io.BytesIO(members[member.name]))
            assert torch.equal(load_audio(source), expected)
            assert torch.equal(load_audio(source, start=320, n_samples=640), expected[320:960])
            assert audio_length(source) == len(expected)
    for outside in (
        AudioSource(str(path), 10**6, 500),
        AudioSource(str(path), 512, 10**7),
        AudioSource(str(path), 512, 10**15),
    ):
        with pytest.raises(AudioError, match=r"shard 一.tar.*exceeds the file"):
            load_audio(outside)


LONG_HEADER = bytearray(encode(NOISE, subtype="PCM_16"))
LONG_HEADER[40:44] = struct.pack("<I", 64_002)
BROKEN = {
    "longer than its data.wav": (bytes(LONG_HEADER), "truncated"),
    "half.wav": (encode(NOISE)[:30_000], "truncated"),
    "half.rf64.wav": (encode(NOISE, fmt="RF64")[:30_000], "truncated"),
    "half.aiff": (encode(NOISE, fmt="AIFF")[:30_000], "truncated"),
    "half.au": (encode(NOISE, fmt="AU")[:30_000], "truncated"),
    "half.flac": (encode(NOISE, fmt="FLAC")[:30_000], "truncated"),
    "header only.flac": (encode(NOISE, fmt="FLAC")[:4200], "truncated"),
    "half.ogg": (encode(NOISE, fmt="OGG")[:9000], "truncated"),
    "half.opus": (encode(NOISE, fmt="OGG", subtype="OPUS")[:5000], "truncated"),
    "half.mp3": (encode(NOISE, fmt="MP3")[:3000], "truncated"),
    "zero.wav": (b"", "is empty"),
    "no samples.wav": (encode(NOISE[:0]), "no audio"),
    "text.wav": ("これは音声ではありません\n".encode() * 50, "not audio"),
    "headerless.raw": (NOISE.tobytes(), "not audio"),
    "cut header.wav": (encode(NOISE)[:20], "not audio"),
    "nan.wav": (
        encode(np.where(np.arange(32_000) == 77, np.nan, NOISE), subtype="FLOAT"),
        "NaN.*sample 77",
    ),
    "nan 8k.wav": (
        encode(np.where(np.arange(32_000) == 77, np.nan, NOISE), 8000, subtype="FLOAT"),
        "NaN.*77",
    ),
    "inf.wav": (
        encode(np.where(np.arange(32_000) == 5, np.inf, NOISE), subtype="DOUBLE"),
        "infinite.*sample 5",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_rejected_by_name(tmp_path, name):
    data, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    for read in (load_audio, lambda path: list(stream_audio(path, block_seconds=0.2))):
        with pytest.raises(AudioError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_truncation_at_any_position_is_detected(tmp_path):
    short = NOISE[:8000]
    for fmt, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("OGG", "OPUS")):
        data = encode(short, fmt=fmt, subtype=subtype)
        for cut in RNG.integers(1, len(data), 60):
            with pytest.raises(AudioError):
                load_audio(io.BytesIO(data[:cut]))


def test_files_of_unknown_length_are_read_to_the_end():
    piped = bytearray(encode(NOISE, subtype="PCM_16"))
    piped[4:8] = piped[40:44] = b"\xff\xff\xff\xff"
    assert len(load_audio(io.BytesIO(piped))) == audio_length(io.BytesIO(piped)) == 32_000
    flac = bytearray(encode(NOISE, fmt="FLAC"))
    flac[21] &= 0xF0  # in STREAMINFO, a total of 0 samples means an unknown length
    flac[22:26] = bytes(4)
    assert len(load_audio(io.BytesIO(flac))) == audio_length(io.BytesIO(flac)) == 32_000
    assert len(load_audio(io.BytesIO(flac), start=31_000, n_samples=3000)) == 1000


def test_unusual_wav_chunks_are_skipped():
    data = encode(NOISE, subtype="PCM_16")
    odd = data[:36] + b"note" + struct.pack("<I", 3) + b"abc\0" + data[36:] + b"LIST" + struct.pack("<I", 400)
    assert len(load_audio(io.BytesIO(odd))) == 32_000


def test_invalid_sources_are_rejected(tmp_path):
    with pytest.raises(AudioError, match=r"no such audio file: .*nothing\.wav"):
        load_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match="folder"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match="device"):
        load_audio(os.devnull)
    with pytest.raises(AudioError, match="text stream"):
        load_audio(io.StringIO("text"))
    with pytest.raises(AudioError, match="negative"):
        load_audio(NOISE, start=-1)
    with pytest.raises(AudioError, match="no audio"):
        load_audio(NOISE[:0])
    with pytest.raises(AudioError, match="must be positive"):
        load_audio(NOISE, -16_000)


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100, 48_000])
@pytest.mark.parametrize(("fmt", "subtype"), [("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("MP3", None)])
def test_blocks_equal_the_whole(fmt, subtype, rate, tmp_path):
    path = tmp_path / f"a.{fmt.lower()}"
    path.write_bytes(encode(np.stack([NOISE, NOISE[::-1]], axis=1), rate, fmt, subtype))
    whole = load_audio(path)
    for seconds in (0.1, 0.73, 100.0):
        for source in (path, path.open("rb"), AudioSource(str(path))):
            blocks = list(stream_audio(source, block_seconds=seconds))
            assert all(len(block) for block in blocks) and len(blocks) > 0.8 * len(whole) / 16_000 / seconds
            together = torch.cat(blocks)
            assert len(together) == len(whole) == audio_length(path) and together.dtype == torch.float32
            rounding = 1e-6 if fmt == "MP3" else 0  # MP3 decoding depends on block boundaries
            torch.testing.assert_close(together, whole, atol=rounding, rtol=0)


def test_array_is_streamed_in_blocks():
    blocks = list(stream_audio(NOISE, block_seconds=0.5))
    assert len(blocks) == 4 and torch.equal(torch.cat(blocks), load_audio(NOISE))
    slower = torch.cat(list(stream_audio(NOISE, 8_000, block_seconds=0.5)))
    assert torch.equal(slower, load_audio(NOISE, 8_000))


@pytest.mark.parametrize("fmt", ["WAV", "FLAC", "OGG", "MP3"])
def test_blocks_of_broken_files_are_rejected(fmt, tmp_path):
    """Reading a broken file fails at the damaged position at the latest."""
    path = tmp_path / "a"
    data = encode(np.tile(NOISE, 10), 16_000, fmt)
    for content in (b"", b"RIFFnothing", data[: len(data) * 2 // 3]):
        path.write_bytes(content)
        with pytest.raises(AudioError):
            load_audio(path)
        with pytest.raises(AudioError, match=str(path)):
            list(stream_audio(path, block_seconds=1.0))
    bad = np.tile(NOISE, 2)
    bad[40_000] = np.nan
    path.write_bytes(encode(bad, subtype="FLOAT"))
    with pytest.raises(AudioError, match="sample 40000"):
        list(stream_audio(path, block_seconds=1.0))


def test_pairs_and_dicts_of_samples_and_rate_are_accepted():
    expected = load_audio(NOISE, 8_000)
    values = NOISE.tolist()
    for source in (
        (8_000, NOISE),
        (8_000.0, NOISE),
        (np.int64(8_000), values),
        {"array": NOISE, "sampling_rate": 8_000, "path": None},
        {"raw": torch.from_numpy(NOISE), "sampling_rate": 8_000},
    ):
        assert is_recording(source)
        assert torch.equal(load_audio(source), expected)
        assert audio_length(source) == len(expected)
        assert torch.equal(torch.cat(list(stream_audio(source))), expected)
        assert torch.equal(load_audio(source, 8_000), expected)
        with pytest.raises(AudioError, match="16000"):
            load_audio(source, 16_000)
    assert torch.equal(load_audio(values, 8_000.0), expected)
    assert torch.equal(load_audio([values, values], 8_000), expected)
    assert is_recording(values) and not is_recording([NOISE, NOISE]) and not is_recording(["a.wav"])


OTHER = [
    None,
    3,
    b"RIFF",
    {"array": NOISE},
    {"bytes": b""},
    ["a.wav"],
    [1, 2],
    (8_000, "a.wav"),
    [[0.1], [0.1, 0.2]],
]


@pytest.mark.parametrize("source", OTHER)
def test_other_sources_are_rejected_with_advice(source):
    for read in (load_audio, audio_length, lambda source: list(stream_audio(source))):
        with pytest.raises(AudioError, match="pass "):
            read(source)


@pytest.mark.parametrize("rate", [8_000.5, 0, -16_000, "16000", True, float("nan"), float("inf")])
def test_invalid_sampling_rates_are_rejected(rate):
    for source, sample_rate in ((NOISE, rate), ((rate, NOISE), None)):
        with pytest.raises(AudioError):
            load_audio(source, sample_rate)
