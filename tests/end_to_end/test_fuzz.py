"""Test of commands with damaged model files and text files, and with random settings (see tools/checks)."""

from __future__ import annotations

import sys

import pytest
from fixtures.checks import run_check


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_damaged_files_and_random_settings_are_handled():
    """The test runs 10 cases of each kind, because thousands of cases take hours."""
    run_check("fuzz.py", "--cases", "10")
