"""What every test may count on: no network, one thread, and the shared data folder where there is one."""

from __future__ import annotations

import os

# Before anything imports torch or a hub client. Subprocesses inherit it. One thread whatever the shell says:
# some tests fork, and a child would wait for ever for the threads that its parent had.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The suite is about arithmetic on a CPU; name devices in JAHUBERT_TEST_CUDA to run it beside a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("JAHUBERT_TEST_CUDA", "")

import importlib.util
import socket
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# Subprocesses of tests import `fixtures` too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPO / "tests"), str(REPO), os.environ.get("PYTHONPATH")])
)
LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`stack` tests outside the full stack are skipped with the command that runs them, not failed."""
    if importlib.util.find_spec("fairseq2") is not None:
        return
    skip = pytest.mark.skip(reason="needs the full stack: make test-stack")
    for item in items:
        if "stack" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to other machines fail at once; the machine itself (torch.distributed) is allowed."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
            raise OSError(f"tests use no network, but something wanted {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`shared/data` beside the checkout, with copies of public corpora. Tests that need it skip without."""
    folder = Path(os.environ.get("JAHUBERT_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of all stages on the corpus of `tests/fixtures/tones`, from one uninterrupted run."""
    from jahubert.train.pipeline import runner

    exp = tmp_path_factory.mktemp("whole") / "exp"
    runner.run([f"recipe={REPO / 'tests' / 'fixtures' / 'tones'}", "stage=all", f"exp={exp}"])
    return exp
