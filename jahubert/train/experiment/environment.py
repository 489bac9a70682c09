"""Description of a run's environment: versions, git commit, device and command line."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import jahubert


def environment() -> dict[str, str]:
    """Return the package versions, device, command line and (in a git checkout) commit of this process."""
    import torch

    commit = git_commit()
    return {
        "jahubert": jahubert.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"commit": commit} if commit else {}),
        "device": device_name(),
        "command": command_line(),
    }


@cache
def git_commit() -> str | None:
    """Return the short commit hash, with "+" appended if tracked files were modified, or None if unknown."""
    checkout = Path(jahubert.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "--short=10", "HEAD")
        return commit + ("+" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def device_name() -> str:
    """Return the name of the GPU if this process uses CUDA, otherwise the name of the processor."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return _cpu_name() or platform.machine()


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    program = Path(sys.argv[0])
    if program.suffix != ".py":
        return shlex.join([program.name, *sys.argv[1:]])
    start = ["python", str(program)]
    package = Path(jahubert.__file__).parent
    if package in program.parents:
        module = ".".join((package.name, *program.relative_to(package).with_suffix("").parts))
        start = ["python", "-m", module.removesuffix(".__main__")]
    return shlex.join([*start, *sys.argv[1:]])
