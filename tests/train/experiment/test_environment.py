"""Tests of the environment that a stage records: commit, device and command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jahubert
from jahubert.train.experiment import environment as module
from jahubert.train.experiment.environment import command_line, environment


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            [str(Path(jahubert.__file__).parent / "run.py"), "recipe=demo", "name=two words"],
            "python -m jahubert.run recipe=demo 'name=two words'",
        ),
        ([str(Path(jahubert.__file__).parent / "__main__.py"), "run"], "python -m jahubert run"),
        (["/usr/bin/jahubert", "run", "stage=all"], "jahubert run stage=all"),
        (["/home/me/train.py"], "python /home/me/train.py"),
    ],
)
def test_command_line_can_be_typed_again(monkeypatch, argv, command):
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == command


def test_environment_has_versions_device_and_commit():
    made_with = environment()
    assert made_with["jahubert"] == jahubert.__version__ and made_with["device"]
    if "commit" in made_with:
        assert re.fullmatch(r"[0-9a-f]{10}\+?", made_with["commit"])


def test_commit_is_omitted_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(jahubert, "__file__", str(tmp_path / "site-packages/jahubert/__init__.py"))
    module.git_commit.cache_clear()
    try:
        assert module.git_commit() is None and "commit" not in environment()
    finally:
        module.git_commit.cache_clear()
