"""Tests that `jahubert run` and `python -m jahubert.run` are the same command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from jahubert import run
from jahubert.cli.main import main as cli
from jahubert.train.pipeline import command


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


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 1), (errno.EBADF, 2), (errno.EMFILE, 1)]
)
def test_only_errors_that_output_can_raise_are_reported_for_standard_output(number, status):
    code = (
        "import os, sys; from jahubert.train.pipeline.reporting import report_error; "
        f"sys.exit(report_error(OSError({number}, os.strerror({number}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert ("standard output" in done.stderr) == (number in (errno.ENOSPC, errno.EBADF))
    assert (done.stderr == "") == (number == errno.EPIPE)


def test_folder_that_is_deleted_during_a_run_is_reported(tmp_path, monkeypatch, capsys):
    def delete_folder(argv):
        folder.rmdir()
        os.getcwd()

    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "_run", delete_folder)
    assert run.main([]) == 2
    error = capsys.readouterr().err
    assert "current folder" in error and error.count("\n") == 1


BROKEN = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, {descriptor})
from jahubert import run
from jahubert.train.pipeline import command
command._run = lambda argv: print("message", file=sys.stderr) or print("result") or 0
sys.exit(run.main([]))
"""


@pytest.mark.parametrize(("descriptor", "status"), [(1, 141), (2, 0)])
def test_result_of_a_stage_for_a_closed_pipe_gives_the_documented_status(descriptor, status):
    code = BROKEN.format(descriptor=descriptor)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert (done.stdout, done.stderr) == (("", "message\n") if descriptor == 1 else ("result\n", ""))
