"""Test that runs the device checks on a simulated device, or on a GPU with JAHUBERT_TEST_CUDA=0."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_device_checks_pass():
    """The checks run in a separate process, because a registered device changes torch globally."""
    checks = Path(__file__).with_name("device_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=checks.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip())
