"""Tests of files with unusual or wrong headers, e.g. concatenated, piped, tagged and truncated files."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from jahubert.audio import AudioSource, audio_length, load_audio, mpeg, sources, stream_audio
from jahubert.errors import AudioError
from jahubert.limits import VARIABLE

RNG = np.random.default_rng(11)
NOISE = (RNG.standard_normal(24_000) * 0.1).astype(np.float32)
# The level rises as at the start of speech, so a variable-bitrate encoder starts with small frames.
QUIET_THEN_LOUD = np.concatenate([NOISE * 1e-4, NOISE, NOISE]).astype(np.float32)


def encode(samples, rate=16_000, fmt="WAV", subtype=None, **options) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=fmt, subtype=subtype, **options)
    return out.getvalue()


def mp3(samples=NOISE, rate=16_000, vbr=False) -> bytes:
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.3} if vbr else {}
    return encode(samples, rate, "MP3", **options)


def without_header_frame(data: bytes) -> bytes:
    """Remove the first MP3 frame, which stores the length."""
    assert b"Xing" in data[:200] or b"Info" in data[:200]
    position = data.find(b"\xff", 4)
    while data[position : position + 2] != data[:2]:
        position = data.find(b"\xff", position + 1)
    return data[position:]


def id3(title: str) -> bytes:
    text = b"\x03" + title.encode() + b"\0"
    frame = b"TIT2" + struct.pack(">IH", len(text), 0) + text
    return b"ID3\x03\0\0" + bytes([0, 0, len(frame) >> 7, len(frame) & 127]) + frame


def seconds(data: bytes, tmp_path: Path) -> float:
    """Return the duration of a file, and check that every reader returns the same duration."""
    path = tmp_path / "audio"
    path.write_bytes(data)
    wav_T = load_audio(path)
    for source in (path, data, AudioSource(str(path), 0, len(data))):
        open_source = partial(io.BytesIO, data) if source is data else partial(lambda source: source, source)
        blocks = torch.cat(list(stream_audio(open_source(), block_seconds=0.3)))
        assert audio_length(open_source()) == len(wav_T) == len(blocks) == len(load_audio(open_source()))
        torch.testing.assert_close(blocks, wav_T, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        load_audio(path, start=9_000, n_samples=50), wav_T[9_000:9_050], atol=1e-6, rtol=0
    )
    return len(wav_T) / 16_000


@pytest.mark.parametrize("vbr", [False, True])
def test_concatenated_mp3_is_read_to_the_end(tmp_path, vbr):
    one = mp3(QUIET_THEN_LOUD, vbr=vbr)
    assert seconds(one + one, tmp_path) == 9.0
    assert seconds(one + id3("second") + one + b"TAG" + bytes(125), tmp_path) == 9.0
    other_rate = mp3(np.repeat(NOISE, 2), 32_000)
    assert seconds(one + other_rate, tmp_path) == 6.0
    bare = without_header_frame(one)
    for data in (bare + bare, one + bare, bare + one):
        assert seconds(data, tmp_path) == pytest.approx(9.0, abs=0.25)


def test_blocks_of_mp3_have_no_glitches():
    """MP3 frames share a bit reservoir, which a seek between two reads would lose."""
    data = mp3(QUIET_THEN_LOUD)
    whole = load_audio(io.BytesIO(data))
    for seconds in (0.05, 0.3, 1.5):
        blocks = torch.cat(list(stream_audio(io.BytesIO(data), block_seconds=seconds)))
        torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=0)


def test_vbr_mp3_without_a_header_frame_is_read_to_the_end(tmp_path):
    bare = without_header_frame(mp3(QUIET_THEN_LOUD, vbr=True))
    assert abs(soundfile.SoundFile(io.BytesIO(bare)).frames / 16_000 - 4.5) > 1  # libsndfile's wrong estimate
    assert seconds(bare, tmp_path) == pytest.approx(4.5, abs=0.15)
    assert seconds(id3("a title") + bare, tmp_path) == pytest.approx(4.5, abs=0.15)


@pytest.mark.parametrize("title", ["Info", "More Information", "Xing", "LAME"])
def test_titles_are_not_header_frames(tmp_path, title):
    bare = without_header_frame(mp3(vbr=True))
    assert seconds(id3(title) + bare, tmp_path) == pytest.approx(1.5, abs=0.15)
    assert seconds(id3(title) + mp3(), tmp_path) == 1.5


def test_truncated_mp3_is_rejected(tmp_path):
    data = mp3(QUIET_THEN_LOUD, vbr=True)
    for cut in (0.3, 0.7, 0.97):
        with pytest.raises(AudioError, match="truncated"):
            seconds(data[: int(cut * len(data))], tmp_path)


@pytest.mark.parametrize("size", [4, 20, 44, 100])
def test_incomplete_first_frame_of_mp3_is_named(tmp_path, capfd, size):
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3()[:size])
    with pytest.raises(AudioError, match=r"a\.mp3 .*(truncated|not audio)"):
        load_audio(path)
    assert capfd.readouterr().err == ""


def test_file_that_shrinks_while_it_is_read_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "a.mp3"
    data = mp3(np.tile(NOISE, 40))
    assert len(data) > 3 * mpeg._BLOCK
    path.write_bytes(data)
    load = mpeg._Window._load

    def shrink(window, position):
        load(window, position)
        os.truncate(path, mpeg._BLOCK)

    monkeypatch.setattr(mpeg._Window, "_load", shrink)
    with pytest.raises(AudioError, match=r"a\.mp3"):
        load_audio(path)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_to_the_end(tmp_path, subtype):
    one = encode(NOISE, fmt="OGG", subtype=subtype)
    two = encode(np.repeat(NOISE, 3), 48_000, fmt="OGG", subtype=subtype)
    assert seconds(one + one + one, tmp_path) == 4.5
    assert seconds(one + two, tmp_path) == 3.0
    joined = load_audio(io.BytesIO(one + two))
    torch.testing.assert_close(joined[:24_000], load_audio(io.BytesIO(one)))
    torch.testing.assert_close(joined[24_000:], load_audio(io.BytesIO(two)))
    for broken in ((one + two)[:-100], one[:-50] + two):
        with pytest.raises(AudioError, match=r"truncated|damaged"):
            load_audio(io.BytesIO(broken))


def test_concatenated_wav_is_read_and_concatenated_flac_is_rejected(tmp_path):
    one, two = encode(NOISE), encode(NOISE, 8_000)
    assert seconds(one + two + one, tmp_path) == 6.0
    with pytest.raises(AudioError, match="truncated"):
        seconds(one + two[:-100], tmp_path)
    flac = encode(np.tile(NOISE, 4), fmt="FLAC")
    path = tmp_path / "twice.flac"
    for data in (flac + flac, encode(NOISE, fmt="FLAC") * 2):
        path.write_bytes(data)
        for read in (load_audio, lambda source: list(stream_audio(source))):
            for source in (path, io.BytesIO(data)):
                with pytest.raises(AudioError, match=r"several FLAC streams|damaged"):
                    read(source)


PLACEHOLDERS = [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
@pytest.mark.parametrize("added", [-44, -36, -8, 0])
def test_wav_from_a_pipe_is_read_to_the_end(tmp_path, placeholder, added):
    data = bytearray(encode(NOISE, subtype="PCM_16"))
    size = max(0, placeholder + added)
    for riff_size in (size, (size + 36) % 2**32, (size + 44) % 2**32, 0xFFFFFFFF):
        data[4:8] = struct.pack("<I", riff_size)
        data[40:44] = struct.pack("<I", size)
        if placeholder == 0xFFFFFFFF and added:
            continue
        assert seconds(bytes(data), tmp_path) == 1.5
    big_endian = bytearray(encode(NOISE, subtype="PCM_16", endian="BIG"))
    assert big_endian[:4] == b"RIFX"
    big_endian[4:8] = big_endian[40:44] = struct.pack(">I", size)
    assert seconds(bytes(big_endian), tmp_path) == 1.5


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_au_from_a_pipe_is_read_to_the_end(tmp_path, placeholder):
    data = bytearray(encode(NOISE, fmt="AU"))
    data[8:12] = struct.pack(">I", placeholder)
    assert seconds(bytes(data), tmp_path) == 1.5


def test_truncated_files_are_rejected_and_empty_ones_are_empty(tmp_path):
    long = encode(np.tile(NOISE, 40))
    for size in (36_001, 100_000, len(long) - 1):
        with pytest.raises(AudioError, match="truncated"):
            seconds(long[:size], tmp_path)
    for fmt in ("AU", "AIFF", "CAF", "RF64"):
        data = encode(NOISE, fmt=fmt)
        with pytest.raises(AudioError, match="truncated"):
            seconds(data[: len(data) // 2], tmp_path)
    empty = encode(NOISE[:0])
    for data in (empty, empty + b"LIST" + struct.pack("<I", 4) + b"INFO"):
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
        with pytest.raises(AudioError, match="no audio"):
            seconds(data, tmp_path)


def test_stale_wav_header_is_rejected(tmp_path):
    """A killed recorder leaves a header with the length at the last update of the header."""
    data = bytearray(encode(NOISE, subtype="PCM_16"))
    data[4:8], data[40:44] = struct.pack("<I", 10_036), struct.pack("<I", 10_000)
    with pytest.raises(AudioError, match="header states"):
        seconds(bytes(data), tmp_path)
    assert seconds(encode(NOISE) + bytes(9_000), tmp_path) == 1.5  # trailing zeros count as padding


def test_bw64_is_read(tmp_path):
    data = encode(NOISE, fmt="RF64")
    assert data[:4] == b"RF64"
    assert seconds(b"BW64" + data[4:], tmp_path) == 1.5
    with pytest.raises(AudioError, match="truncated"):
        seconds(b"BW64" + data[4:-100], tmp_path)


def test_result_depends_on_bytes_only(tmp_path):
    """File names, their encodings and suffixes, and macOS resource files do not change the result."""
    data = mp3()
    expected = load_audio(io.BytesIO(data))
    folder = os.fsencode(tmp_path)
    sidecar = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(4000)
    for name in (b"a.mp3", b"a.wav", b"a.raw", b"a", "録音.mp3".encode("shift_jis"), "録音.mp3".encode()):
        path = os.path.join(folder, name)
        Path(os.fsdecode(path)).write_bytes(data)
        Path(os.fsdecode(os.path.join(folder, b"._" + name))).write_bytes(sidecar)
        assert torch.equal(load_audio(Path(os.fsdecode(path))), expected)
    code = "import sys, jahubert; print(jahubert.audio_length(sys.argv[1]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for name in ("録音.mp3".encode("shift_jis"), "録音.mp3".encode()):
        arguments = [sys.executable, "-c", code, os.path.join(folder, name)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) == len(expected)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_pipes_are_read(tmp_path):
    for data in (encode(NOISE), encode(NOISE, fmt="FLAC"), mp3()):
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        writer = threading.Thread(target=fifo.write_bytes, args=(data,))
        writer.start()
        assert len(load_audio(fifo)) == 24_000
        writer.join()
        fifo.unlink()
        code = "import jahubert; print(jahubert.audio_length('/dev/stdin'))"
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
        assert int(done.stdout) == 24_000


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_endless_sources_are_rejected(monkeypatch):
    with pytest.raises(AudioError, match="/dev/zero"):
        audio_length("/dev/zero")
    monkeypatch.setattr(sources, "STREAM_BYTES", 1 << 20)
    with open("/dev/zero", "rb") as stream, pytest.raises(AudioError, match=VARIABLE):
        audio_length(stream)
    with subprocess.Popen(["cat", "/dev/zero"], stdout=subprocess.PIPE) as process:
        with pytest.raises(AudioError, match=VARIABLE):
            audio_length(f"/dev/fd/{process.stdout.fileno()}")
        process.stdout.close()


def test_seekable_streams_have_no_size_limit(monkeypatch, tmp_path):
    data = encode(NOISE)
    path = tmp_path / "a.wav"
    path.write_bytes(b"skipped" + data)
    monkeypatch.setattr(sources, "STREAM_BYTES", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 400)
    assert len(load_audio(io.BytesIO(data))) == len(NOISE)
    for buffering in (-1, 0):
        with path.open("rb", buffering) as stream:
            stream.seek(len(b"skipped"))
            assert torch.equal(load_audio(stream), load_audio(AudioSource(str(path), len(b"skipped"))))

    class Unseekable(io.BytesIO):
        def seek(self, *_):
            raise io.UnsupportedOperation("seek")

    for stream in (Unseekable(data), SimpleNamespace(read=io.BytesIO(data).read)):
        with pytest.raises(AudioError, match=VARIABLE):
            load_audio(stream)


def test_shared_cases_have_their_full_length(shared_data):
    cases = shared_data.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"needs {cases}")
    for path in sorted((cases / "wavpipe").glob("*.wav")):
        assert audio_length(path) == len(load_audio(path)) == 89_280
    for path in sorted((cases / "concatenated").iterdir()):
        assert audio_length(path) == len(load_audio(path)) == pytest.approx(15.6 * 16_000, rel=0.01)


@pytest.mark.parametrize("fmt", ["AVR", "MAT4", "MAT5", "MPC2K", "NIST", "SVX", "VOC", "W64"])
def test_truncated_files_of_rare_formats_are_rejected(tmp_path, fmt):
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE[:16_000], 16_000, format=fmt, subtype="PCM_16")
    expected, _ = soundfile.read(path, dtype="float32")
    assert audio_length(path) == len(expected) == 16_000
    np.testing.assert_array_equal(load_audio(path), expected)
    content = path.read_bytes()
    for size in (len(content) // 2, len(content) - 300):
        path.write_bytes(content[:size])
        for read in (load_audio, audio_length, lambda path: list(stream_audio(path))):
            with pytest.raises(AudioError, match=r"a\.wav is truncated"):
                read(path)


@pytest.mark.parametrize("rate", [1, 7, 999, 2**31 - 1])
def test_impossible_sampling_rates_are_rejected(tmp_path, rate):
    """Resampling from such a rate would take minutes."""
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE[:1_600], 16_000)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    for read in (load_audio, audio_length, lambda path: list(stream_audio(path))):
        with pytest.raises(AudioError, match=f"sampling rate of {rate} Hz"):
            read(path)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize(("stated", "error"), [
    ("half", "last FLAC frame"), ("one less", "last FLAC frame"), ("one more", "FLAC frame|truncated"),
    ("all bits set", "FLAC frame|truncated"), ("unknown", None), ("right", None),
])  # fmt: skip
def test_stated_length_of_flac_is_compared_with_the_last_frame(tmp_path, rate, stated, error):
    path, n_samples = tmp_path / "a.flac", 3 * rate + 17
    soundfile.write(path, np.resize(NOISE, n_samples), rate)
    count = {
        "half": n_samples // 2, "one less": n_samples - 1, "one more": n_samples + 1,
        "all bits set": 2**36 - 1, "unknown": 0, "right": n_samples,
    }[stated]  # fmt: skip
    content = bytearray(path.read_bytes())
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | count
    content[18:26] = fields.to_bytes(8, "big")
    path.write_bytes(bytes(content) + (b"TAG" + bytes(125) if error is None and count else b""))
    for read in (load_audio, audio_length, lambda path: torch.cat(list(stream_audio(path)))):
        if error is None:
            length = read(path)
            assert (length if isinstance(length, int) else len(length)) == (
                2 * n_samples * 16_000 + rate
            ) // (2 * rate)
        else:
            with pytest.raises(AudioError, match=error):
                read(path)


SPARSE = {
    "RIFF": b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16),
    "RF64": b"RF64\xff\xff\xff\xffWAVE",
    "AIFF": b"FORM\0\0\0\0AIFFCOMM" + struct.pack(">IHIH", 18, 1, 100, 16) + bytes(10),
    "CAF": b"caff\0\1\0\0desc" + struct.pack(">q", 32) + bytes(32),
    "chunks after the samples": encode(NOISE) + b"LIST\0\0\0\0" * 20_000,
    "concatenated": encode(NOISE[:0]) * 20_000,
}


@pytest.mark.parametrize("head", SPARSE.values(), ids=SPARSE)
def test_file_of_millions_of_chunks_is_rejected_at_once(tmp_path, head):
    """A chunk without content takes 8 bytes, and a sparse file of such chunks takes no space."""
    path = tmp_path / "audio"
    path.write_bytes(head)
    if len(head) < 1000:
        os.truncate(path, 1 << 31)
    for read in (audio_length, load_audio):
        started = time.process_time()
        with pytest.raises(AudioError, match="more than"):
            read(path)
        assert time.process_time() - started < 5
