"""Test of commands with damaged model files and text files, and with random settings (see tools/checks)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "checks" / "fuzz.py"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_damaged_files_and_random_settings_are_handled():
    """The test runs 10 cases of each kind, because thousands of cases take hours."""
    done = subprocess.run(
        [sys.executable, TOOL, "--cases", "10"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
