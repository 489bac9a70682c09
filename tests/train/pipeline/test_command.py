"""Tests that `jahubert run` and `python -m jahubert.run` are the same command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jahubert import run
from jahubert.cli.main import main as cli


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["recipe=nope"], ["recipe=demo", "stage=kmean"], ["recipe=demo", "kmeans.n_cluster=3"]],
)
def test_jahubert_run_equals_python_m_jahubert_run(capfd, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    expected = run.main(arguments), capfd.readouterr()
    assert (cli(["run", *arguments]), capfd.readouterr()) == expected
    assert list(tmp_path.iterdir()) == []


def test_entry_point_imports_neither_torch_nor_hydra():
    code = "import sys, jahubert.run; sys.exit(any(name in sys.modules for name in ('torch', 'hydra')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
