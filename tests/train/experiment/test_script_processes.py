"""Tests of processes that run a file: their output, their errors, and their end."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jahubert.errors import DataError, JahubertError
from jahubert.train.experiment.script_processes import ScriptProcess, run_in_processes

HEAD = """
import os, signal, sys, time
from pathlib import Path
from jahubert.errors import DataError
from jahubert.train.experiment.script_processes import run_items, run_job
"""


@dataclass(frozen=True)
class Item:
    name: str


def script(folder: Path, body: str) -> Path:
    (folder / "helper.py").write_text("word = '音'\n", encoding="utf-8")
    path = folder / "script.py"
    path.write_text(HEAD + body, encoding="utf-8")
    return path


def test_lines_are_read_and_the_folder_of_the_file_is_importable(tmp_path):
    body = "import helper\nrun_job(lambda job: [helper.word + word for word in [*job, str(sys.argv[1:])]])\n"
    with ScriptProcess(script(tmp_path, body), ["ア", "イ"]) as process:
        assert [process.readline() for _ in range(4)] == ["音ア", "音イ", "音[]", ""]


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        ("raise DataError('words.txt is empty')", DataError, "^words.txt is empty$"),
        ("open('/missing/file')", DataError, "/missing/file"),
        ("raise OSError(28, os.strerror(28), 'a.flac')", JahubertError, r"a\.flac"),
        ("1 / 0", JahubertError, "ZeroDivisionError"),
        ("os.kill(os.getpid(), signal.SIGKILL)", JahubertError, "SIGKILL.*memory"),
    ],
)
def test_error_of_the_process_is_raised(tmp_path, failure, expected, message):
    body = f"def fail(job):\n    yield 1\n    {failure}\n\n\nrun_job(fail)\n"
    with ScriptProcess(script(tmp_path, body), None) as process:
        assert process.readline() == "1"
        with pytest.raises(JahubertError, match=message) as caught:
            process.readline()
    assert type(caught.value) is expected


def test_process_does_not_outlive_its_block(tmp_path):
    body = "def work(job):\n    yield os.getpid()\n    time.sleep(600)\n\n\nrun_job(work)\n"
    started = time.monotonic()
    with ScriptProcess(script(tmp_path, body), None) as process:
        pid = int(process.readline())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert time.monotonic() - started < 300


def test_items_are_written_once_by_several_processes_if_there_are_many(tmp_path):
    body = (
        "def write(item, folder):\n    (folder / item['name']).write_text(str(os.getpid()))\n\n\n"
        "run_items(dict, write)\n"
    )
    path = script(tmp_path, body)

    def write(item: Item, folder: Path) -> None:
        (folder / item.name).write_text(str(os.getpid()))

    for n, processes, n_used in ((5, 4, 1), (20, 2, 2), (20, 1, 1)):
        folder = tmp_path / f"{n}-{processes}"
        folder.mkdir()
        run_in_processes(path, [Item(str(i)) for i in range(n)], folder, processes, write)
        written = {file.name: file.read_text() for file in folder.iterdir()}
        assert set(written) == {str(i) for i in range(n)}
        assert len(set(written.values())) == n_used
        assert (str(os.getpid()) in written.values()) == (n_used == 1)
