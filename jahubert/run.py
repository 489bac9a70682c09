"""The entry point `python -m jahubert.run`, the same command as `jahubert run`.

The command itself is in `jahubert/train/pipeline/command.py`; it is imported only when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages selected by `argv` (default: the command line) and return the exit status."""
    from jahubert.train.pipeline import command

    return command.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
