"""Tests of the Triton kernels: in triton's interpreter on the CPU or on a GPU, and compiled without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.stack
@pytest.mark.parametrize("file", ["triton_checks.py", "triton_compilation.py"])
def test_triton_kernels(file, tmp_path):
    """The checks run in separate processes, because they change triton globally."""
    pytest.importorskip("triton")
    checks = Path(__file__).with_name(file)
    interpreted = file == "triton_checks.py" and not torch.cuda.is_available()
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=checks.parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
