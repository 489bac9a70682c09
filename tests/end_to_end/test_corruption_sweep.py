"""Test that damage to every kind of file in an experiment is detected (see tools/checks)."""

from __future__ import annotations

from fixtures.checks import run_check


def test_damage_to_every_kind_of_file_is_detected():
    """The sweep makes one trial per file and kind of damage."""
    run_check("corruption_sweep.py", "--trials", "1")
