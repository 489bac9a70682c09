"""Tests that only rank 0 shows progress bars, only on a terminal, and removes them at the end."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest
from fixtures.terminal import Terminal
from tqdm.contrib import DummyTqdmFile

from jahubert import run
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress


@contextmanager
def terminal_stderr() -> Iterator[Terminal]:
    """Redirect standard error to a terminal."""
    with (
        Terminal() as terminal,
        os.fdopen(os.dup(terminal.slave), "w", encoding="utf-8") as file,
        redirect_stderr(file),
    ):
        yield terminal


def loop(steps: int = 5, stop: int = 5) -> None:
    with progress("units", "utterances", 2 * steps) as done:
        for step in range(steps):
            if step == stop:
                raise ValueError("the fourth step failed")
            time.sleep(0.15)  # the bar is redrawn at most ten times per second
            done(2)


def test_bar_is_drawn_and_removed():
    with terminal_stderr() as terminal:
        loop()
    assert "units:   0%" in terminal.written and "| 0/10 [" in terminal.written
    assert "| 8/10 [" in terminal.written and " utterances/s]" in terminal.written
    assert terminal.screen == []


def test_bar_is_removed_before_an_error_is_printed():
    with terminal_stderr() as terminal:
        with pytest.raises(ValueError, match="the fourth"):
            loop(stop=3)
        print("jahubert: error: the fourth", file=sys.stderr)
    assert "| 4/10 [" in terminal.written
    assert terminal.screen == ["jahubert: error: the fourth"]


def test_log_lines_do_not_garble_the_bar():
    with terminal_stderr() as terminal:
        handler = logging.StreamHandler(DummyTqdmFile(sys.stderr))  # jahubert.run uses the same handler
        with progress("outer", "layers", 2) as outer, progress("inner", "passes") as inner:
            handler.emit(logging.makeLogRecord({"msg": "a log line"}))
            inner(1)
            outer(1)
    assert "outer:" in terminal.written and "inner: 0 passes [" in terminal.written
    assert terminal.screen == ["a log line"]


def test_bar_is_shown_only_on_a_terminal_and_rank_0(capfd, monkeypatch):
    loop(steps=1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with terminal_stderr() as terminal:
        loop(steps=1)
    assert terminal.written == ""


def test_every_step_updates_the_heartbeat():
    before = distributed.last_heartbeat()
    loop(steps=1)
    after = distributed.last_heartbeat()
    assert after.updated > before.updated and after._replace(updated=before.updated) == before


def test_missing_train_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.contrib", None)
    assert run.main(["recipe=demo", "stage=prepare"]) == 2
    assert ".[train]" in capsys.readouterr().err
    assert run.main(["--help"]) == 0
