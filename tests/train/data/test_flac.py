"""Tests of FLAC files: conversion from floating-point numbers, and files that are written once."""

from __future__ import annotations

import numpy as np
import soundfile

from jahubert.audio import load_audio
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
