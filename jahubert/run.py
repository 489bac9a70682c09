"""Entry point of `python -m jahubert.run`, which is the same command as `jahubert run`.

The implementation is in `jahubert/train/pipeline/command.py`, which is imported only when the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages selected by `argv` (default: the command line), and return the exit status."""
    from jahubert.streams import open_standard_streams
    from jahubert.train.pipeline import command

    open_standard_streams()
    return command.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
