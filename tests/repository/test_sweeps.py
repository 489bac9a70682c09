"""Tests that the sweeps in tools/checks cover all commands, formats and stages."""

from __future__ import annotations

import argparse
import sys

import pytest
from fixtures.checks import CHECKS

from jahubert.cli.main import build_parser
from jahubert.train.experiment.registry import STAGES


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKS))
    names = ("small_experiment", "corruption_sweep")
    yield [__import__(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return action.choices


def test_faults_occur_in_every_command_format_and_stage(checks, tmp_path):
    small_experiment, _ = checks
    lines = list(small_experiment.commands(tmp_path / "exp", tmp_path / "out").values())
    assert {words[0] for words in lines} == set(subcommands())
    (to,) = (action for action in subcommands()["convert"]._actions if action.dest == "to")
    assert {words[words.index("--to") + 1] for words in lines if "--to" in words} == set(to.choices)
    assert {job.stage for job in small_experiment.stage_jobs(tmp_path / "exp")} == set(STAGES)


def test_input_of_every_command_is_damaged(checks):
    _, sweep = checks
    readers = (sweep.EXPERIMENT_READERS, sweep.BUNDLE_READERS, sweep.NGRAM_READERS, sweep.NO_READERS)
    assert {command for commands in readers for command in commands} == set(subcommands())
