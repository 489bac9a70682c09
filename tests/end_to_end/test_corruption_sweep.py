"""Test that damage to every kind of file in an experiment is detected (see tools/checks)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "checks" / "corruption_sweep.py"


def test_damage_to_every_kind_of_file_is_detected():
    """The sweep makes one trial per file and kind of damage."""
    done = subprocess.run(
        [sys.executable, TOOL, "--trials", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
