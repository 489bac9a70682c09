"""Tests of streaming feature extraction: order, batches, worker processes, and errors."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.unit_stages import PART, N, make_corpus, stages

from jahubert.errors import AudioError
from jahubert.formats.bundle import load_bundle
from jahubert.train.clustering.features import HubertLayer, Mfcc
from jahubert.train.clustering.streaming import stream_features, to_host
from jahubert.train.data.manifest import Manifest
from jahubert.train.pipeline import runner
from jahubert.train.stages import features


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


class Recorder(Mfcc):
    """Feature that records the lengths of the waveforms in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def __call__(self, wavs):
        self.batches.append([len(wav_T) for wav_T in wavs])
        return super().__call__(wavs)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_cross_parts(corpus, workers):
    manifest, feature = Manifest(corpus / "manifest.arrow"), Recorder()
    parts = [[0, 1, 2], [3, 4], [6]]
    rows = [row for row, _ in stream_features(manifest, feature, parts, 80.0, workers)]
    assert rows == [0, 1, 2, 3, 4, 6]
    assert feature.batches == [[int(manifest.n_samples[row]) for row in part] for part in parts]


@pytest.mark.parametrize("kind", ["mfcc", "hubert"])
def test_workers_do_not_change_the_features(corpus, kind):
    manifest = Manifest(corpus / "manifest.arrow")
    feature = Mfcc() if kind == "mfcc" else HubertLayer(load_bundle(corpus / "model").model, 1)
    threads, processes = (
        list(to_host(stream_features(manifest, feature, [range(N)], 0.5, workers))) for workers in (0, 2)
    )
    for (row, one_SD), (other_row, other_SD) in zip(threads, processes, strict=True):
        assert row == other_row and torch.equal(one_SD, other_SD)


def test_copies_are_awaited_on_the_gpu_of_the_tensor(monkeypatch):
    """An event on the stream of another GPU would report the copy as finished too early."""
    gpu, recorded = torch.device("cuda", 1), []

    class Event:
        def record(self, stream: object = None) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            assert recorded

    def tensor(value: int) -> SimpleNamespace:
        return SimpleNamespace(device=gpu, to=lambda device, non_blocking: torch.tensor([value]))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    copies = list(to_host((row, tensor(10 * row)) for row in range(100)))
    assert [(row, int(copy)) for row, copy in copies] == [(row, 10 * row) for row in range(100)]
    assert recorded == [gpu] * 100


def test_workers_do_not_change_the_stages(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_PART_SIZE", PART)
    for name, workers in (("threads", 0), ("processes", 2)):
        configs = stages(corpus, tmp_path / name)
        for stage in ("features", "kmeans", "label"):
            config = configs[stage]
            if stage != "kmeans":
                config = replace(config, workers=workers, batch_seconds=0.5)
            runner.run_stage(stage, config, tmp_path / name / stage)
    for file in ("features/sample.npy", "label/units.bin"):
        assert (tmp_path / "threads" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes()
    assert np.load(tmp_path / "threads/features/sample.npy").shape == (300, 39)


def test_error_of_a_worker_keeps_its_type_and_ends_the_workers(corpus, monkeypatch):
    def load(self, row, real=Manifest.load):
        if row == 9:
            raise AudioError(f"utterance {self[row].id!r} is truncated")
        return real(self, row)

    monkeypatch.setattr(Manifest, "load", load)
    manifest, rows = Manifest(corpus / "manifest.arrow"), []
    with pytest.raises(AudioError, match="'u9' is truncated"):
        for row, _ in stream_features(manifest, Mfcc(), [range(N)], 0.3, workers=2):
            rows.append(row)
    assert rows == list(range(len(rows))) and rows and max(rows) < 9
    assert not multiprocessing.active_children()
