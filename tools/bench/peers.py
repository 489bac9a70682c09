"""Availability of the packages used for comparison."""

import importlib


def importable(name: str) -> bool:
    """Return whether a package can be imported; a mismatched torchaudio raises various errors."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
