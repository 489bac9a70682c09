"""Tests that no recording is rejected because of a file system error during `prepare`."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures.csj_tree import planned, write_talk
from fixtures.reazonspeech_tree import Release

from jahubert.audio import AudioSource, sources
from jahubert.errors import AudioError, DataError
from jahubert.train.data import utterances
from jahubert.train.data.utterances import Rejected, Utterance, Utterances
from jahubert.train.experiment.registry import recipe_module, recipe_reader
from jahubert.train.stages.prepare import check_items


@pytest.fixture
def delays(monkeypatch) -> list[float]:
    delays: list[float] = []
    monkeypatch.setattr(utterances.time, "sleep", delays.append)
    return delays


@pytest.fixture
def recording(tmp_path) -> Utterance:
    path = tmp_path / "a.flac"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    return Utterance("a", AudioSource(str(path)), split="train")


class FlakyOpen:
    """Replacement for `open` that fails the first `failures` times."""

    def __init__(self, number: int, failures: int):
        self.number, self.failures = number, failures

    def __call__(self, *args, **kwargs):
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, "the file server failed")
        return open(*args, **kwargs)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_transient_error_is_retried(recording, delays, monkeypatch, number):
    monkeypatch.setattr(sources, "open", FlakyOpen(number, 2), raising=False)
    (item,) = check_items([recording])
    assert isinstance(item, Utterance) and item.n_samples == 16_000 and delays == [1.0, 5.0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_lasting_error_stops_the_stage(recording, delays, monkeypatch, number):
    monkeypatch.setattr(sources, "open", FlakyOpen(number, 99), raising=False)
    with pytest.raises(DataError, match=r"a\.flac"):
        list(check_items([recording]))
    assert delays == [1.0, 5.0, 20.0]


def test_read_error_that_a_decoder_reports_as_truncation_is_retried(recording, delays, monkeypatch):
    monkeypatch.setattr(utterances, "open", FlakyOpen(errno.EIO, 1), raising=False)
    calls = []

    def read():
        calls.append(1)
        if len(calls) == 1:
            raise AudioError("a.flac is truncated")
        return 7

    assert utterances.read_reliably(read, recording.audio) == 7 and delays == [1.0]


def test_missing_and_damaged_recordings_are_rejected_at_once(recording, delays, tmp_path):
    damaged = tmp_path / "b.flac"
    damaged.write_bytes(b"not audio " * 99)
    missing = tmp_path / "c.flac"
    items = [Utterance(path.name, AudioSource(str(path)), split="train") for path in (damaged, missing)]
    assert [type(item) for item in check_items([recording, *items])] == [Utterance, Rejected, Rejected]
    assert not delays


@pytest.fixture
def table(recording, tmp_path):
    """Return a function that reads two recordings, one of them too long, with the table recipe."""
    noise_T = 0.1 * np.random.default_rng(1).standard_normal(48_000)
    soundfile.write(tmp_path / "long.flac", noise_T, 16_000)
    read, Config = (recipe_reader("table", name) for name in ("prepare", "Config"))
    return lambda: list(read(tmp_path, tmp_path / "work", Config(max_seconds=2.0), 0))


@pytest.mark.parametrize("failures", [1, 2])
def test_recipe_reads_again_after_an_error_of_the_file_system(table, delays, monkeypatch, failures):
    expected = table()
    assert len(expected) == 3 and all(isinstance(item, Utterance) for item in expected)
    monkeypatch.setattr(sources, "open", FlakyOpen(errno.EIO, failures), raising=False)
    assert table() == expected and len(delays) == failures


def test_recipe_stops_at_a_lasting_error_of_the_file_system(table, delays, monkeypatch):
    table()
    monkeypatch.setattr(sources, "open", FlakyOpen(errno.EIO, 99), raising=False)
    with pytest.raises(DataError, match=r"\.flac"):
        table()


def test_full_disk_is_not_retried(delays, tmp_path):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "copy"))

    with pytest.raises(OSError, match="copy"):
        utterances.read_reliably(write, tmp_path / "source")
    assert not delays


def read_csj(folder, work):
    talk = planned("A01F0055", core=True)
    write_talk(folder, "usb", talk, ("sdb", "xml"))
    return lambda: recipe_module("csj").prepare(folder, work, recipe_module("csj").Config(), 0)


def read_builtin(folder, work):
    write_audio(folder / "a.wav")
    (folder / "transcripts.tsv").write_text("file\ttext\na.wav\t雨\n", encoding="utf-8")
    (folder / "clips.tsv").write_text("file\tspeaker\na.wav\tx\n", encoding="utf-8")
    builtin = recipe_module("builtin")
    return lambda: [
        *builtin._test_recordings(folder), *builtin.read_speech.other_languages(folder, work / "wav")
    ]  # fmt: skip


def read_tofugu(folder, work):
    for kana in ("か", "き", "く", "け"):
        write_audio(folder / f"{kana}【{kana}】.ogg")
    return lambda: recipe_module("tofugu").prepare(folder, work, recipe_module("tofugu").Config(), 0)


def read_voices(folder, work):
    voices = recipe_module("voices")
    shutil.copy(os.fsdecode(voices.openjtalk().DEFAULT_HTS_VOICE), folder / "a.htsvoice")
    (folder / "texts.txt").write_text("雨が降る。\n", encoding="utf-8")
    options = {"texts": str(folder / "texts.txt"), "own_share": 0.0, "dev_share": 0.0, "test_share": 0.0}
    return lambda: voices.prepare(folder, work, voices.Config(**options), 0)


def read_table(folder, work):
    write_audio(folder / "a.wav")
    (folder / "table.csv").write_text("path\na.wav\n", encoding="utf-8")
    prepare, config = recipe_module("table").prepare, recipe_module("table").Config()
    return lambda: prepare(folder / "table.csv", work, config, 0)


def read_fairseq(folder, work):
    write_audio(folder / "a.wav")
    (folder / "train.tsv").write_text(f"{folder}\na.wav\t16000\n", encoding="utf-8")
    fairseq = recipe_module("fairseq")
    return lambda: check_items(fairseq.prepare(folder, work, fairseq.Config(), 0))


def read_reazonspeech(folder, work, parquet=False):
    release = Release(folder, shards=2, rows=2)
    data = release.write_parquet() if parquet else release.write()
    recipe = recipe_module("reazonspeech")
    config = recipe.Config(subset="all" if parquet else "tiny", processes=1)
    return lambda: recipe.prepare(data, work, config, 0)


def write_audio(path):
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)


def ids_of(items) -> list[tuple]:
    return [
        (type(item), item.ids if isinstance(item, Utterances) else item.id, getattr(item, "reason", ""))
        for item in items
    ]


class FlakyStat:
    """Replacement for the module `os`, in which the first `stat` of each path fails with ESTALE."""

    def __init__(self, flaky):
        self.flaky = flaky

    def __getattr__(self, name):
        return getattr(os, name)

    def stat(self, path):
        return self.flaky(os.stat, path)


READERS = [read_csj, read_builtin, read_tofugu, read_voices, read_table, read_fairseq, read_reazonspeech]


@pytest.mark.parametrize("corpus", [*READERS, partial(read_reazonspeech, parquet=True)])
def test_every_recipe_reads_its_source_again(corpus, delays, tmp_path, monkeypatch):
    """The first read of every source file fails.

    The demo recipe has no source, and the languages recipe uses the reader of the builtin recipe.
    """
    pytest.importorskip("pyopenjtalk")
    folder = tmp_path / "source"
    folder.mkdir()
    failed: set[tuple] = set()

    def flaky(function, path, *args):
        key = (getattr(function, "__name__", ""), str(path))
        if str(path).startswith(str(folder)) and key not in failed:
            failed.add(key)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return function(path, *args)

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    expected = list(corpus(folder, tmp_path / "first")())
    read = corpus(folder, tmp_path / "second")
    read_bytes, open_file = Path.read_bytes, open
    monkeypatch.setattr(Path, "read_bytes", lambda path: flaky(read_bytes, path))
    opened = lambda path, *args, **options: flaky(lambda p: open_file(p, *args, **options), path)  # noqa: E731
    monkeypatch.setattr(sources, "open", opened, raising=False)
    monkeypatch.setattr(utterances, "open", opened, raising=False)
    monkeypatch.setattr(utterances, "os", FlakyStat(flaky))
    assert ids_of(read()) == ids_of(expected)
    assert failed and delays == [1.0] * len(failed)
