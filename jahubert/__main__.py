"""Entry point of `python -m jahubert`, which is the same command as `jahubert`."""

from __future__ import annotations

import sys

from jahubert.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
