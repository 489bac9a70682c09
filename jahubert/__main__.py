"""`python -m jahubert` is the command `jahubert`."""

from __future__ import annotations

import sys

from jahubert.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
