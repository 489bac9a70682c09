"""Test of kills and file system errors during every stage and command that writes (see tools/checks)."""

from __future__ import annotations

import shutil
import sys

import pytest
from fixtures.checks import run_check


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_stages_and_commands_recover_from_faults():
    """The test makes two trials per task and omits the ONNX export, because the whole sweep takes hours."""
    run_check("fault_sweep.py", "--points", "2", "--omit", "convert onnx")
