"""Tests of media formats that require an optional decoder, PyAV or ffmpeg."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from jahubert.audio import AudioSource, audio_length, load_audio, stream_audio
from jahubert.errors import AudioError

RATE = 44_100
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)).astype(np.float32)
FORMATS = {  # suffix -> file format and codec
    "m4a": ("mp4", "aac"),
    "webm": ("webm", "libopus"),
    "aac": ("adts", "aac"),
    "wma": ("asf", "wmav2"),
}


def encode(suffix: str) -> bytes:
    """Encode three seconds of a stereo tone."""
    av = pytest.importorskip("av", reason="needs the extra media")
    fmt, codec = FORMATS[suffix]
    out = io.BytesIO()
    with av.open(out, "w", format=fmt) as container:
        rate = 48_000 if codec == "libopus" else RATE
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(np.stack([TONE, TONE]), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return out.getvalue()


def use_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every optional decoder except `name` unavailable."""
    if name == "ffmpeg":
        if shutil.which("ffmpeg") is None:
            pytest.skip("needs ffmpeg on PATH")
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_media_files_are_decoded(tmp_path, monkeypatch, suffix, decoder):
    data = encode(suffix)
    use_decoder(decoder, monkeypatch)
    path = tmp_path / f"録音 {suffix}"  # without a suffix, the format is detected from the content
    path.write_bytes(data)
    wav_T = load_audio(path)
    assert len(wav_T) / 16_000 == pytest.approx(3.0, abs=0.1)
    assert 0.25 < float(wav_T[8_000:40_000].abs().max()) < 0.35
    spectrum = torch.fft.rfft(wav_T[8_000:40_000]).abs()
    assert float(spectrum.argmax()) / 2 == pytest.approx(440, abs=1)
    blocks = torch.cat(list(stream_audio(path, block_seconds=0.4)))
    assert len(blocks) == len(wav_T) == audio_length(path) == audio_length(io.BytesIO(data))
    torch.testing.assert_close(blocks, wav_T, atol=1e-6, rtol=0)
    assert torch.equal(load_audio(path, start=5_000, n_samples=99), wav_T[5_000:5_099])
    assert len(load_audio(AudioSource(str(path), 0, len(data)))) == len(wav_T)


@pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
def test_broken_media_files_are_rejected(tmp_path, monkeypatch, decoder):
    m4a, webm = encode("m4a"), encode("webm")
    use_decoder(decoder, monkeypatch)
    path = tmp_path / "a.m4a"
    for data in (m4a[: len(m4a) // 2], webm[: len(webm) // 2], m4a[:8] + bytes(2000)):
        path.write_bytes(data)
        with pytest.raises(AudioError, match=r"a\.m4a"):
            load_audio(path)


def test_missing_decoder_is_explained(monkeypatch, tmp_path):
    heads = {
        "a.m4a": b"\0\0\0\x20ftypM4A " + bytes(100),
        "a.webm": b"\x1a\x45\xdf\xa3" + bytes(100),
        "a.wma": bytes.fromhex("3026b2758e66cf11") + bytes(100),
        "a.aac": b"\xff\xf1\x50\x80" + bytes(100),
    }
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    for name, data in heads.items():
        path = Path(tmp_path, name)
        path.write_bytes(data)
        for read in (load_audio, audio_length, lambda path: list(stream_audio(path))):
            with pytest.raises(AudioError, match=r"\.\[media\].*ffmpeg") as error:
                read(path)
            assert str(path) in str(error.value)


def test_core_formats_do_not_need_the_optional_decoder(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for fmt in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "RF64", "W64"):
        path = tmp_path / f"a.{fmt}"
        soundfile.write(path, TONE, RATE, format=fmt)
        assert len(load_audio(path)) == 48_000
