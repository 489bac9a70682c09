"""Tests that hostile files are rejected quickly, with little memory and one message, and run no code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from fixtures.hostile import write_corpus, write_wrong_settings

from jahubert.cli.main import main
from jahubert.errors import CheckpointError
from jahubert.formats.bundle import load_bundle

CPU_SECONDS = 3.0  # without limits, some files take minutes; CPU time varies on a busy machine
MEMORY = 200 << 20  # bytes
TIMEOUT = 20  # seconds; a file that takes longer is considered hanging


def open_in_child(path: Path) -> dict:
    """Run `jahubert info` in a forked process, and return its status, output, CPU time and peak memory."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT)
        before = resource.getrusage(resource.RUSAGE_SELF)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                status = main(["info", str(path)])
            except BaseException:
                status = 1
                traceback.print_exc()
        after = resource.getrusage(resource.RUSAGE_SELF)
        result = {
            "status": status,
            "output": output.getvalue(),
            "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "memory": after.ru_maxrss * 1024 - resident,
        }
        os.write(write, json.dumps(result).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not content:
        return {"status": status, "output": "", "seconds": TIMEOUT, "memory": 0}
    return json.loads(content)


def problems(path: Path, statuses: tuple[int, ...]) -> list[str]:
    result = open_in_child(path)
    messages = []
    if result["status"] not in statuses or "Traceback" in result["output"]:
        messages.append(f"status {result['status']}: {result['output'][-1500:]}")
    if result["status"] and result["output"].count("\n") > 1:
        messages.append(f"more than one message: {result['output']}")
    if result["seconds"] > CPU_SECONDS or result["memory"] > MEMORY:
        messages.append(f"{result['seconds']:.1f} s of CPU time, {result['memory'] >> 20} MiB")
    if any(ord(c) < 32 and c != "\n" for c in result["output"]):
        messages.append(f"control characters: {result['output']!r}")
    return [f"{path.name}: {problem}" for problem in messages]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, because forked processes would wait for threads that exist only in their parent."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.skipif(sys.platform != "linux", reason="the test reads /proc")
def test_hostile_files_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path)
    assert len(corpus) > 200
    assert main(["info", str(tmp_path / "base")]) == 0
    messages = [problem for path in corpus.values() for problem in problems(path, (2,))]
    assert not messages, "\n\n".join(messages)
    assert not (tmp_path / "ran").exists()


def test_wrong_settings_raise_checkpoint_error(tmp_path):
    n_refused = 0
    for path in write_wrong_settings(tmp_path):
        try:
            load_bundle(path)
        except CheckpointError:
            n_refused += 1
    assert n_refused > 100
