"""The recordings that a command line names, and what is said of each: done, failed, how far we are."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jahubert.errors import AudioError, ConfigError, UserError

AUDIO_ENDINGS = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".w64",
    ".rf64", ".caf", ".sph", ".nist",
)  # fmt: skip
STDIN = "-"


@dataclass(frozen=True)
class Input:
    """One recording: how it is called, and the name of its results below the output folder."""

    label: str
    base: Path

    def open(self) -> Path | io.BytesIO:
        """What `load_audio` takes."""
        return io.BytesIO(sys.stdin.buffer.read()) if self.label == STDIN else Path(self.label)


def find_inputs(
    arguments: Sequence[str], into: str | None, ending: str
) -> tuple[list[Input], dict[str, AudioError]]:
    """Files, the audio files below folders, and standard input; and the folders that hold none.

    ConfigError if two would write the same file below `into`.
    """
    found: list[Input] = []
    empty: dict[str, AudioError] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            found.append(Input(STDIN, Path("stdin")))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS and p.is_file())
            found += [Input(str(p), p.relative_to(path).with_suffix("")) for p in files]
            if not files:
                empty[argument] = AudioError(
                    f"{argument}: no audio file in it (endings: {' '.join(AUDIO_ENDINGS)})"
                )
        else:
            found.append(Input(argument, Path(path.stem)))
    if [item.label for item in found].count(STDIN) > 1:
        raise ConfigError("standard input (-) can be given only once")
    if into is not None:
        if Path(into).exists() and not Path(into).is_dir():
            raise ConfigError(f"-o {into} is a file; give a folder")
        owner: dict[Path, str] = {}
        for item in found:
            other = owner.setdefault(item.base, item.label)
            if other is not item.label:
                target = Path(into, str(item.base) + ending)
                raise ConfigError(
                    f"{other} and {item.label} would both write {target}; use two runs with two folders"
                )
    return found, empty


def names_wanted(arguments: Sequence[str]) -> bool:
    """Whether a line of results must say whose it is: not for a single file, always for a folder."""
    return len(arguments) > 1 or Path(arguments[0]).is_dir()


class Report:
    """Counts what failed, says it on standard error, and shows how far we are if somebody is looking."""

    def __init__(self, inputs: Sequence[Input], empty: dict[str, AudioError]):
        self.n_inputs, self.n_seen, self.failed, self.status = len(inputs) + len(empty), 0, 0, 0
        self.shows = self.n_inputs > 1 and sys.stderr.isatty()
        for label, error in empty.items():
            self.failure(label, error)
            self.seen(label)

    def seen(self, label: str) -> None:
        """One more is done, well or not."""
        self.n_seen += 1
        if self.shows:
            end = "\n" if self.n_seen == self.n_inputs else ""
            print(f"\r\x1b[K[{self.n_seen}/{self.n_inputs}] {label}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line of results or an error."""
        if self.shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def failure(self, label: str, error: Exception) -> None:
        self.clear()
        self.failed += 1
        if not isinstance(error, UserError | OSError):
            traceback.print_exception(error, file=sys.stderr)
            self.status = 1
        elif self.status == 0:
            self.status = error.exit_status if isinstance(error, UserError) else 2
        message = str(error) or type(error).__name__
        complain(message if label in message and label != STDIN else f"{label}: {message}")

    def finish(self) -> int:
        if self.failed and self.n_inputs > 1:
            complain(f"{self.failed} of {self.n_inputs} failed")
        return self.status


def complain(message: object) -> None:
    print(f"jahubert: error: {message}", file=sys.stderr)
