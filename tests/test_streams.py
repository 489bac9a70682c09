"""Tests of the standard streams of a command."""

from __future__ import annotations

import subprocess
import sys

FULL_PIPE = """
import os, sys
from jahubert.streams import open_standard_streams

read, write = os.pipe()
os.set_blocking(write, False)
os.dup2(write, 2)
open_standard_streams()
for _ in range(100):
    print("x" * 10_000, file=sys.stderr)
print("done")
"""


def test_full_non_blocking_standard_error_does_not_end_a_command():
    done = subprocess.run([sys.executable, "-c", FULL_PIPE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "done\n"
