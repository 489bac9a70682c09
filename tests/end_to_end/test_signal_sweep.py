"""Test of stop signals that are sent to every stage while it reads its input (see tools/checks)."""

from __future__ import annotations

import sys

import pytest
from fixtures.checks import run_check


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_every_stage_stops_while_reading_and_resumes():
    """The stages receive one signal each, alternately SIGTERM and SIGINT."""
    run_check("signal_sweep.py", "--in-turn")
