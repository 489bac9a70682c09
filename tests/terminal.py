"""A terminal: what was written to it, and what a person sees of that in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from typing import Any


class Terminal:
    """`slave` is the file descriptor for a process; after the `with` there are `written` and `screen`."""

    COLUMNS = 100

    def __enter__(self) -> Terminal:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 40, self.COLUMNS, 0, 0))
        self.parts: list[bytes] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.slave)
        self.reader.join()
        os.close(self.master)

    def _read(self) -> None:
        try:
            while part := os.read(self.master, 4096):
                self.parts.append(part)
        except OSError:  # nobody has it open any more
            pass

    @property
    def written(self) -> str:
        return b"".join(self.parts).decode("utf-8")

    @property
    def screen(self) -> list[str]:
        """Rows with something on them, after carriage returns, new lines and the cursor going up."""
        rows, row, column = {0: ""}, 0, 0
        for token in re.findall(r"\x1b\[[A-Z]|[^\x1b]", self.written):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
            elif token == "\x1b[A":
                row -= 1
            else:
                assert len(token) == 1, f"what does {token!r} do?"
                if column == self.COLUMNS:
                    row, column = row + 1, 0
                line = rows.get(row, "").ljust(column)
                rows[row], column = line[:column] + token + line[column + 1 :], column + 1
        return [line.rstrip() for _, line in sorted(rows.items()) if line.strip()]
