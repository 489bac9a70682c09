"""Tests for other platforms: modules can be imported without POSIX, and Apple GPUs are selected."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from jahubert.errors import ConfigError
from jahubert.model.device import pick_device

# The second import simulates Windows, which lacks some modules and functions of POSIX systems.
IMPORT_WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys

def import_all():
    imported = {}
    import jahubert
    for module in pkgutil.walk_packages(jahubert.__path__, "jahubert."):
        if module.name.endswith("__main__"):
            continue
        try:
            imported[module.name] = importlib.import_module(module.name)
        except ImportError as error:  # an optional package is missing
            imported[module.name] = str(error)
    return imported

before = import_all()
for name in [name for name in sys.modules if name.partition(".")[0] == "jahubert"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None
for module, names in (
    (signal, "SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGALRM SIGQUIT SIGCHLD SIGPIPE pthread_sigmask"),
    (os, "fork forkpty killpg getpgid setsid geteuid getuid statvfs sched_getaffinity mkfifo uname fchmod"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
after = import_all()
sys.platform = "linux"
failed = [{name for name in modules if isinstance(modules[name], str)} for modules in (before, after)]
changed = {name: after[name] for name in failed[0] ^ failed[1]}
assert not changed, changed
assert len(after) > 80, len(after)
"""


def test_every_module_imports_without_posix():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_POSIX], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_apple_gpu_is_selected_if_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == pick_device(None).type == pick_device("mps").type == "mps"


def test_missing_apple_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="mps"):
        pick_device("mps")
