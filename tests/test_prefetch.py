"""Tests of background prefetching: order, limits, errors, and the end of threads."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.unit_stages import N, make_corpus, stages

from jahubert.errors import AudioError, DiskFullError
from jahubert.prefetch import N_THREADS, THREAD_PREFIX, prefetch
from jahubert.train.clustering.features import Mfcc
from jahubert.train.clustering.streaming import stream_features
from jahubert.train.data.manifest import Manifest
from jahubert.train.pipeline import runner


def threads() -> set[threading.Thread]:
    """Return the running prefetch threads."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)}


def test_results_are_in_order_and_computed_ahead():
    def work(number: int) -> int:
        time.sleep(0.002 * (7 * number % 5))
        started[number].set()
        return number * number

    started, before = [threading.Event() for _ in range(20)], threads()
    for number, square in prefetch(work, range(20), n=3):
        assert square == number * number
        assert all(event.wait(10) for event in started[: number + 4])
    assert threads() == before


def test_deferred_items_are_computed_when_possible():
    """Deferred items are computed in the background later, or in the main thread when they are reached."""
    hold, computed = [True], {}

    def work(number: int) -> int:
        computed[number] = threading.current_thread()
        return -number

    main, before = threading.current_thread(), threads()
    with closing(prefetch(work, range(30), 5, lambda number: hold[0] or number in (7, 8))) as results:
        assert [next(results) for _ in range(3)] == [(0, 0), (1, -1), (2, -2)]
        assert list(computed) == [0, 1, 2] and set(computed.values()) == {main}
        time.sleep(0.05)
        hold[0] = False
        next(results)
        deadline = time.monotonic() + 10
        while not {4, 5, 6} <= computed.keys() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert {4, 5, 6} <= computed.keys() and 7 not in computed
        assert list(results) == [(number, -number) for number in range(4, 30)]
    assert [number for number in range(4, 30) if computed[number] is main] == [7, 8]
    assert threads() == before


def test_deferred_items_precede_new_items():
    """If only a few results may be stored, the results of the next items in order are stored."""
    computed: dict[int, threading.Thread] = {}
    taken = 0

    def work(number: int) -> None:
        computed[number] = threading.current_thread()

    with closing(prefetch(work, range(30), 9, lambda number: len(computed) - taken >= 5)) as results:
        for number, _ in results:
            taken += 1
            time.sleep(0.005)
            assert max(computed) <= number + 5 + N_THREADS
    assert threading.current_thread() not in computed.values()


@pytest.mark.parametrize("n", [1, 4])
def test_at_most_n_items_are_started_ahead(n):
    started = []
    with closing(prefetch(started.append, iter(range(1000)), n)) as stream:
        for _ in range(10):
            next(stream)
        time.sleep(0.05)
        assert len(started) <= 10 + n


def test_error_is_raised_at_its_position():
    def work(number: int) -> int:
        if number in (4, 5):
            raise ValueError(f"file {number}")
        return number

    before, seen = threads(), []
    with pytest.raises(ValueError, match="file 4"):
        for number, _ in prefetch(work, range(9)):
            seen.append(number)
    assert seen == [0, 1, 2, 3] and threads() == before


def test_early_exit_waits_only_for_started_items():
    started, hold, before = [], threading.Event(), threads()

    def work(number: int) -> None:
        started.append(number)
        if number:
            hold.wait(10)

    with pytest.raises(KeyboardInterrupt):
        for _ in prefetch(work, range(99), n=90):
            hold.set()
            raise KeyboardInterrupt
    assert threads() == before and len(started) < 90


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def test_utterances_are_read_during_computation(corpus, monkeypatch):
    started, load = [threading.Event() for _ in range(N)], Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda self, row: started[row].set() or load(self, row))

    class Waiting(Mfcc):
        def __call__(self, wavs):
            third = min(len(found) + 3, N - 1)  # a batch has at most two utterances
            assert started[third].wait(10), "the next utterance is not being read"
            return super().__call__(wavs)

    found: list[int] = []
    for row, _ in stream_features(Manifest(corpus / "manifest.arrow"), Waiting(), [range(N)], 0.3):
        found.append(row)
    assert found == list(range(N))


@pytest.mark.parametrize("kind", [AudioError, DiskFullError])
def test_failing_stage_reports_the_reason_and_ends_its_threads(corpus, tmp_path, monkeypatch, kind):
    def load(self, row, real=Manifest.load):
        if row == 9:
            raise AudioError(f"utterance {self[row].id!r} is truncated")
        return real(self, row)

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    config, before = replace(stages(corpus, tmp_path)["features"], batch_seconds=0.3), threads()
    (tmp_path / "features").mkdir()
    if kind is AudioError:
        monkeypatch.setattr(Manifest, "load", load)
    else:
        monkeypatch.setattr("jahubert.train.stages.features._write_part", full)
    message = {AudioError: "utterance 'u9' is truncated", DiskFullError: "the disk is full"}[kind]
    with pytest.raises(kind, match=message):
        runner.run_stage("features", config, tmp_path / "features")
    assert threads() == before
