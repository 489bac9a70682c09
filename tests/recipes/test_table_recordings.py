"""Tests of the FLAC copies of recordings whose parts the table recipe cannot read by seeking."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from jahubert.audio import load_audio, stream_audio
from jahubert.errors import AudioError
from jahubert.train.data import utterances
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, load_utterance
from jahubert.train.experiment.registry import recipe_module

table = recipe_module("table")
module = table.read_recordings.__globals__
ROUNDING = 0.5 / (1 << 15) + 1e-6  # error of 16-bit samples, plus a margin for MP3 decoders
SEGMENTS = ((0.0, 0.7), (0.5004, 1.3), (1.9, 2.5))  # seconds


def write_audio(path: Path, rate: int = 44_100, seconds: float = 2.5, channels: int = 2, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise_TC = 0.1 * np.random.default_rng(len(path.name)).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, noise_TC, rate, **options)
    return path


def write_table(folder: Path, *names: str, segments=SEGMENTS) -> Path:
    lines = [f"{folder / name},{start},{end}" for name in names for start, end in segments]
    (folder / "table.csv").write_text("\n".join(["path,start,end", *lines]) + "\n", encoding="utf-8")
    return folder / "table.csv"


def prepared(data: Path, work: Path, **options) -> tuple[list[Utterance], list[Rejected]]:
    items = list(table.prepare(data, work, table.Config(**options), 0))
    return [i for i in items if isinstance(i, Utterance)], [i for i in items if isinstance(i, Rejected)]


def copies(work: Path) -> list[str]:
    return sorted(path.name for path in work.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "options"), [("a.wav", {}), ("a.mp3", {}), ("a.flac", {"subtype": "PCM_24"})]
)
def test_parts_of_the_copy_equal_those_of_the_recording(tmp_path, name, options):
    source = write_audio(tmp_path / name, **options)
    items, rejected = prepared(write_table(tmp_path, name), tmp_path / "work")
    assert not rejected and len(items) == len(SEGMENTS)
    assert len({item.audio.path for item in items}) == len(copies(tmp_path / "work" / "converted")) == 1
    info = soundfile.info(items[0].audio.path)
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
    assert info.frames == len(load_audio(source))
    for item, (start, end) in zip(items, SEGMENTS, strict=True):
        assert (item.start, item.n_samples) == (round(start * 16_000), round(end * 16_000) - item.start)
        expected_T = load_audio(source, start=item.start, n_samples=item.n_samples)
        torch.testing.assert_close(load_utterance(item), expected_T, atol=ROUNDING, rtol=0)


def test_a_copy_is_kept_until_its_recording_changes(tmp_path):
    source = write_audio(tmp_path / "a.wav")
    data, work = write_table(tmp_path, "a.wav"), tmp_path / "work"
    first = prepared(data, work)
    (copy,) = (work / "converted").iterdir()
    written = copy.stat().st_mtime_ns
    assert prepared(data, work) == first and copy.stat().st_mtime_ns == written
    os.utime(source, ns=(0, 0))
    assert prepared(data, work)[0][0].audio.path != str(copy) and len(copies(work)) == 2


def test_recordings_of_equal_stem_have_separate_copies(tmp_path):
    names = ("x/a.wav", "y/a.wav", "z/a.mp3")
    for name in names:
        write_audio(tmp_path / name)
    items, _ = prepared(write_table(tmp_path, *names, segments=SEGMENTS[1:]), tmp_path / "work")
    assert len({item.audio.path for item in items}) == len(copies(tmp_path / "work")) == 3


def test_whole_and_seekable_recordings_are_not_converted(tmp_path):
    for name in ("parts.wav", "other.flac"):
        write_audio(tmp_path / name, 16_000)
    data = write_table(tmp_path, "parts.wav", "other.flac")
    whole = [write_audio(tmp_path / name) for name in ("a.mp3", "b.wav", "end.wav")]
    with data.open("a") as file:
        file.writelines(f"{path},,{'2.51' if path.stem == 'end' else ''}\n" for path in whole)
    items, rejected = prepared(data, tmp_path / "work")
    assert not rejected and len(items) == 2 * len(SEGMENTS) + 3
    assert {Path(item.audio.path).parent for item in items} == {tmp_path} and not copies(tmp_path / "work")


def test_long_recordings_without_text_are_cut_in_their_copy(tmp_path):
    source = write_audio(tmp_path / "in" / "long.mp3", seconds=7.0, channels=1)
    write_audio(tmp_path / "in" / "short.mp3", seconds=2.0)
    work = tmp_path / "in" / "work"  # the copies in this folder must not be read as recordings
    first = prepared(tmp_path / "in", work, max_seconds=3.0)
    assert prepared(tmp_path / "in", work, max_seconds=3.0) == first
    *parts, short = first[0]
    assert short.audio.path == str(tmp_path / "in" / "short.mp3")
    assert {Path(part.audio.path).parent for part in parts} == {work / "converted"}
    assert sum(part.n_samples for part in parts) == len(load_audio(source)) and not first[1]


def test_a_recording_that_cannot_be_decoded_is_rejected_with_the_reason(tmp_path):
    """The file is damaged in the middle, which only decoding detects."""
    broken = write_audio(tmp_path / "broken.flac")
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    broken.write_bytes(content)
    write_audio(tmp_path / "intact.wav")
    data = write_table(tmp_path, "broken.flac", "intact.wav")
    items, rejected = prepared(data, tmp_path / "work", max_rejected=0.6)
    with pytest.raises(AudioError) as expected:
        load_audio(broken)
    assert [(item.reason, item.detail) for item in rejected] == [
        (UNUSABLE_AUDIO, f"{data}:{line}: {expected.value}") for line in (2, 3, 4)
    ]
    assert len(items) == 3 and len(copies(tmp_path / "work")) == 1


def test_audio_far_above_full_scale_is_not_distorted(tmp_path, caplog):
    """Some programs store 16-bit samples as floating-point numbers without scaling them."""
    t = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "a.wav", 3000 * np.sin(2000 * t), 44_100, "FLOAT")
    items, _ = prepared(write_table(tmp_path, "a.wav", segments=[(0.2, 0.5)]), tmp_path / "work")
    assert items[0].audio.path == str(tmp_path / "a.wav") and not copies(tmp_path / "work")
    assert [r.levelname for r in caplog.records if "a.wav" in r.getMessage()] == ["WARNING"]


def test_file_system_error_during_conversion_is_retried(tmp_path, monkeypatch):
    delays: list[float] = []
    monkeypatch.setattr(utterances.time, "sleep", delays.append)
    write_audio(tmp_path / "a.wav")

    def failing(path: Path) -> Iterator[torch.Tensor]:
        yield torch.zeros(16_000)
        monkeypatch.setitem(module, "stream_audio", stream_audio)
        raise AudioError("read error") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(module, "stream_audio", failing)
    items, rejected = prepared(write_table(tmp_path, "a.wav"), tmp_path / "work")
    assert not rejected and soundfile.info(items[0].audio.path).frames == 40_000 and delays == [1.0]


def test_interrupt_stops_the_conversion_and_keeps_finished_copies(tmp_path, monkeypatch):
    for name in ("a.wav", "endless.wav"):
        write_audio(tmp_path / name)
    data, work = write_table(tmp_path, "a.wav", "endless.wav"), tmp_path / "work"

    @contextmanager
    def interrupted(*args):
        def done(n: int) -> None:
            raise KeyboardInterrupt

        yield done

    with monkeypatch.context() as patch:
        patch.setitem(module, "progress", interrupted)
        patch.setitem(module, "usable_cores", lambda: 2)
        patch.setitem(
            module,
            "stream_audio",
            lambda path: (
                itertools.repeat(torch.zeros(1600)) if path.stem == "endless" else stream_audio(path)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            prepared(data, work)
    (copy,) = (work / "converted").iterdir()
    assert copy.name.startswith("a-")
    written = copy.stat().st_mtime_ns
    assert len(prepared(data, work)[0]) == 6
    assert copy.stat().st_mtime_ns == written and len(copies(work)) == 2
