"""Tests that the scripts in tools/ can be imported with the present package."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from fixtures.shims import REPO

SCRIPTS = sorted((REPO / "tools").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_tools_can_be_imported(path, monkeypatch):
    """Scripts that import other scripts of their folder expect it in `sys.path`."""
    monkeypatch.setattr(sys, "path", [str(path.parent), str(REPO), *sys.path])
    name = f"imported_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.__doc__
