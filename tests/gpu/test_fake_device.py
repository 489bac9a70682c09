"""Everything that may run on a GPU, on a device that is not the CPU; with JAHUBERT_TEST_CUDA=0, on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_nothing_stays_on_the_cpu_and_the_numbers_are_the_same():
    """In a process of its own, as a second device changes what torch does in all of it."""
    checks = Path(__file__).with_name("device_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=checks.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip())
