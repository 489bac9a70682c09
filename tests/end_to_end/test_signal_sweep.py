"""Test of stop signals that are sent to every stage while it reads its input (see tools/checks)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "checks" / "signal_sweep.py"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_every_stage_stops_while_reading_and_resumes():
    """Each stage receives one signal, SIGTERM or SIGINT in turn."""
    done = subprocess.run(
        [sys.executable, TOOL, "--in-turn"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
