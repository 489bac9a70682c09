"""Availability of the packages that the benchmarks use for comparison."""

import importlib
from functools import cache


@cache
def importable(name: str) -> bool:
    """Return whether a package can be imported. A package built for another torch raises various errors."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True
