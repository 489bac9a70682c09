"""Tests of FLAC files: conversion from floating-point numbers, and files that are written once."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from jahubert.audio import load_audio
from jahubert.formats.atomic import atomic_write
from jahubert.train.data import flac
from jahubert.train.data.flac import flac_length, write_flac, write_flac_once


def test_16_bit_audio_is_written_without_loss_and_louder_audio_is_clipped(tmp_path):
    source = tmp_path / "source.wav"
    samples = np.arange(-(1 << 15), 1 << 15, 7, dtype=np.int16)
    soundfile.write(source, samples, 16_000)
    write_flac(tmp_path / "new" / "copy.flac", load_audio(source).numpy())
    assert np.array_equal(soundfile.read(tmp_path / "new" / "copy.flac", dtype="int16")[0], samples)
    write_flac(tmp_path / "loud.flac", np.array([0.5, 1.5, -1.5], np.float32))
    assert soundfile.read(tmp_path / "loud.flac", dtype="int16")[0].tolist() == [16384, 32767, -32768]


def test_a_readable_file_is_kept_and_a_damaged_one_is_replaced(tmp_path):
    path, calls = tmp_path / "a" / "b.flac", []

    def make() -> np.ndarray:
        calls.append(len(calls))
        return np.full(1000, 0.1, np.float32)

    assert flac_length(path) is None
    assert [write_flac_once(path, make) for _ in range(2)] == [1000, 1000] and calls == [0]
    path.write_bytes(path.read_bytes()[:10])
    assert flac_length(path) is None
    assert write_flac_once(path, make) == flac_length(path) == 1000 and calls == [0, 1]


def test_blocks_equal_one_array_and_are_written_completely_or_not_at_all(tmp_path):
    wave_T = 0.1 * np.random.default_rng(0).standard_normal(20_000)
    whole, parts = tmp_path / "whole.flac", tmp_path / "parts.flac"
    assert write_flac(whole, wave_T) == write_flac(parts, iter(np.split(wave_T, [1, 7000]))) == 20_000
    assert np.array_equal(soundfile.read(whole)[0], soundfile.read(parts)[0])
    assert write_flac_once(parts, lambda: pytest.fail("the file exists")) == 20_000

    def failing():
        yield wave_T
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        write_flac(tmp_path / "new.flac", failing())
    assert sorted(tmp_path.iterdir()) == [parts, whole]


class FailingFile:
    """Replacement for `atomic_write` whose file fails in call number `fails_at` of the method `method`."""

    def __init__(self, method: str, fails_at: int = 0):
        self.method, self.fails_at, self.n_calls = method, fails_at, 0

    @contextmanager
    def __call__(self, path, mode):
        with atomic_write(path, mode) as file:
            yield SimpleNamespace(
                **{name: partial(self.call, name, getattr(file, name)) for name in ("write", "seek", "tell")}
            )

    def call(self, name, function, *args):
        self.n_calls += name == self.method
        if name == self.method and self.n_calls == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)


@pytest.mark.parametrize("method", ["write", "seek"])  # libsndfile seeks to complete the header
def test_write_error_at_any_time_is_raised(tmp_path, monkeypatch, method):
    monkeypatch.setattr(flac, "atomic_write", intact := FailingFile(method))
    write_flac(tmp_path / "a.flac", np.zeros(9000))
    assert intact.n_calls
    for fails_at in range(1, intact.n_calls + 1):
        monkeypatch.setattr(flac, "atomic_write", FailingFile(method, fails_at))
        with pytest.raises(OSError, match="No space") as caught:
            write_flac(tmp_path / "b.flac", np.zeros(9000))
        assert caught.value.filename == str(tmp_path / "b.flac")
    assert [path.name for path in tmp_path.iterdir()] == ["a.flac"]
