"""Availability of the packages that the benchmarks compare with."""

import importlib


def importable(name: str) -> bool:
    """Whether a package can be imported; torchaudio built for another torch raises various errors."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
