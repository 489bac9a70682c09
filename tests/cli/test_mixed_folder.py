"""Test that the commands process all usable audio files in a mixed folder and name the unusable ones."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures.sounds import syllables

from jahubert.cli.main import main
from jahubert.frames import HUBERT

RATE = 48_000  # a rate that all formats in this test support
SECONDS = 2.0


def encode(samples: np.ndarray, format: str, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=format, subtype=subtype)
    return stream.getvalue()


def encode_m4a(samples: np.ndarray) -> bytes:
    av = pytest.importorskip("av", reason="needs the extra media")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for part in (frame, None):
            container.mux(track.encode(part))
    return stream.getvalue()


def piped(wav: bytes) -> bytes:
    """Replace the sizes in the header by the placeholder of a program that writes to a pipe."""
    data = wav.index(b"data") + 4
    return wav[:4] + b"\xff" * 4 + wav[8:data] + struct.pack("<I", 0xFFFFFFFF) + wav[data + 4 :]


@pytest.fixture
def mixed(folder) -> Path:
    samples = np.repeat(syllables(SECONDS).numpy(), RATE // 16_000)
    mp3, opus, wav = encode(samples, "MP3"), encode(samples, "OGG", "OPUS"), encode(samples, "WAV")
    files = {
        "concatenated.mp3": mp3 + mp3,
        "chained.opus": opus + opus,
        "one.ogg": encode(samples, "OGG", "VORBIS"),
        "deep/日本語.m4a": encode_m4a(samples),
        "deep/pipe.WAV": piped(wav),
        "cut.wav": wav[: len(wav) // 2],
        "page.mp3": b"<!DOCTYPE html><html></html>",
        "._one.mp3": b"\0\x05\x16\x07",
        "__MACOSX/one.ogg": b"\0\x05\x16\x07",
        "notes.txt": b"no audio",
    }
    for name, content in files.items():
        path = folder / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "mixed"


def test_every_audio_file_of_a_mixed_folder_is_processed_or_named(mixed, bundle, capsys):
    assert main(["features", "--model", bundle, "-o", "features", str(mixed)]) == 2
    err = capsys.readouterr().err
    assert "cut.wav" in err and "page.mp3" in err and "2 of 7 failed" in err and len(err.splitlines()) == 3
    expected = {"concatenated": 2, "chained": 2, "one": 1, "deep/日本語": 1, "deep/pipe": 1}
    written = {
        path.relative_to("features").with_suffix("").as_posix() for path in Path("features").rglob("*.npy")
    }
    assert written == set(expected)
    for name, copies in expected.items():
        n_frames = len(np.load(f"features/{name}.npy"))
        # Encoders add up to 0.1 s of silence to each copy.
        n_least = HUBERT.n_frames(round(copies * SECONDS * 16_000))
        assert n_least <= n_frames <= n_least + 5 * copies
    assert main(["transcribe", "--model", bundle, "-o", "text", str(mixed)]) == 2
    assert "2 of 7 failed" in capsys.readouterr().err
    texts = {
        path.relative_to("text").with_suffix("").as_posix(): path for path in Path("text").rglob("*.txt")
    }
    assert set(texts) == set(expected) and all(
        path.read_text(encoding="utf-8").strip() for path in texts.values()
    )
