"""Tests that file system errors during `prepare` never reject a recording."""

from __future__ import annotations

import errno
import sys

import numpy as np
import pytest
import soundfile

from jahubert.audio import AudioSource, sources
from jahubert.errors import AudioError, DataError
from jahubert.train.data import utterances
from jahubert.train.data.utterances import Rejected, Utterance
from jahubert.train.experiment.registry import recipe_reader
from jahubert.train.stages.prepare import usable


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
    (item,) = usable([recording])
    assert isinstance(item, Utterance) and item.n_samples == 16_000 and delays == [1.0, 5.0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_lasting_error_stops_the_stage(recording, delays, monkeypatch, number):
    monkeypatch.setattr(sources, "open", FlakyOpen(number, 99), raising=False)
    with pytest.raises(DataError, match=r"a\.flac"):
        list(usable([recording]))
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
    assert [type(item) for item in usable([recording, *items])] == [Utterance, Rejected, Rejected]
    assert not delays


@pytest.fixture
def table(recording, tmp_path):
    """Return the reader of recipe table for two recordings, one of which is longer than `max_seconds`."""
    noise_T = 0.1 * np.random.default_rng(1).standard_normal(48_000)
    soundfile.write(tmp_path / "long.flac", noise_T, 16_000)
    read, Config = (recipe_reader("table", name) for name in ("prepare", "Config"))
    return lambda: list(read(tmp_path, tmp_path / "work", Config(max_seconds=2.0), 0))


@pytest.mark.parametrize("failures", [1, 2])
def test_recipe_reads_again_after_an_error_of_the_file_system(table, delays, monkeypatch, failures):
    expected = table()
    assert len(expected) == 3 and all(isinstance(item, Utterance) for item in expected)
    monkeypatch.setattr(sources, "open", FlakyOpen(errno.EIO, failures), raising=False)
    recipe_module = sys.modules[recipe_reader("table", "prepare").__module__]
    recipe_module._length.cache_clear()
    assert table() == expected and len(delays) == failures


def test_recipe_stops_at_a_lasting_error_of_the_file_system(table, delays, monkeypatch):
    table()
    recipe_module = sys.modules[recipe_reader("table", "prepare").__module__]
    recipe_module._length.cache_clear()
    monkeypatch.setattr(sources, "open", FlakyOpen(errno.EIO, 99), raising=False)
    with pytest.raises(DataError, match=r"\.flac"):
        table()


def test_full_disk_is_not_retried(delays, tmp_path):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "copy"))

    with pytest.raises(OSError, match="copy"):
        utterances.read_reliably(write, tmp_path / "source")
    assert not delays
