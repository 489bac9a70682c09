"""Limits on the memory and time for opening model files, data files and streams.

Files that occur in practice stay below these limits. The environment variable `JAHUBERT_LIMITS` multiplies
all limits, so that larger files from a trusted source can be opened.
"""

from __future__ import annotations

import os

from jahubert.errors import ConfigError

VARIABLE = "JAHUBERT_LIMITS"
ADVICE = f"if you trust the source, set the environment variable {VARIABLE}=10 for ten times the limit"
JSON_BYTES = 4 << 20  # size of a JSON file, which can take fifty times as much memory when parsed
PICKLE_BYTES = 16 << 20  # size of a pickle without its tensors
INSTRUCTIONS = 500_000  # instructions in a pickle; 300 tensors and 50,000 symbols need 270,000
DEPTH = 100  # number of levels of nested settings
EXPANSION = 4  # number of tensor bytes per byte of the file
GZIP_EXPANSION = 100  # number of decompressed bytes per byte of a gzip file; text needs 3 to 40
GZIP_BYTES = 16 << 20  # decompressed size of a gzip file that is allowed regardless of GZIP_EXPANSION
STREAM_BYTES = 4 << 30  # size of a recording from a pipe or non-seekable stream; 37 h of 16-bit, 16 kHz mono
CONVS = 64  # number of layers in the front end
LAYERS = 512  # number of Transformer blocks


def limit(value: int) -> int:
    """Return a limit multiplied by the value of `JAHUBERT_LIMITS` (default: 1).

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get(VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ConfigError(f"{VARIABLE}={text}: must be a positive number")
    return int(value * factor)
