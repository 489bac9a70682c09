"""Shared test setup: no network, one thread, and fixtures for the shared data and a full run."""

from __future__ import annotations

import os

# These variables are set before torch or a hub client is imported, and subprocesses inherit them. One thread
# is required because some tests fork, and a forked child would wait forever for the threads of its parent.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Tests run on the CPU, unless JAHUBERT_TEST_CUDA makes GPUs visible to them.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("JAHUBERT_TEST_CUDA", "")

import importlib.util
import signal
import socket
from pathlib import Path

import pytest

# Subprocesses inherit ignored signals; nohup ignores SIGHUP, and background jobs of a shell ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # Windows has no SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPO = Path(__file__).resolve().parent.parent
# With this path, subprocesses of tests can import `fixtures`.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPO / "tests"), str(REPO), os.environ.get("PYTHONPATH")])
)
LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `stack` tests without the full stack, and name the command that runs them."""
    if importlib.util.find_spec("fairseq2") is not None:
        return
    skip = pytest.mark.skip(reason="needs the full stack: make test-stack")
    for item in items:
        if "stack" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reject connections to other machines. torch.distributed may connect locally."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
            raise OSError(f"network access is disabled in tests: connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the root folder of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with copies of public corpora, or skip the test if the folder does not exist."""
    folder = Path(os.environ.get("JAHUBERT_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all stages on `tests/fixtures/tones` without interruption, and return the experiment folder."""
    from jahubert.train.pipeline import runner

    exp = tmp_path_factory.mktemp("whole") / "exp"
    runner.run([f"recipe={REPO / 'tests' / 'fixtures' / 'tones'}", "stage=all", f"exp={exp}"])
    return exp
