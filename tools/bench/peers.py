"""What the benchmarks need to know of the peers they compare with."""

import importlib


def importable(name: str) -> bool:
    """Whether a peer is there and works: torchaudio beside another torch fails in ways of its own."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
