"""Test of kills and file system errors during every stage and command that writes (see tools/checks)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "checks" / "fault_sweep.py"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_stages_and_commands_recover_from_faults():
    """The test makes two trials per task, because the complete sweep takes hours, and no export to ONNX."""
    done = subprocess.run(
        [sys.executable, TOOL, "--points", "2", "--omit", "convert onnx"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
