"""Availability of the packages that the benchmarks use for comparison."""

import importlib


def importable(name: str) -> bool:
    """Return whether a package can be imported. A mismatched torchaudio raises various errors."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
