"""Input files, progress and error messages of the commands."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from jahubert.errors import (
    MAX_MESSAGE,
    AudioError,
    ConfigError,
    UserError,
    exit_status,
    printable,
    shorten,
)

STDIN = "-"
# Suffixes that are likely meant for a file. Other suffixes may be part of the name of a folder, as in run.v2.
FILE_SUFFIXES = (
    ".ass", ".csv", ".doc", ".docx", ".h5", ".htm", ".html", ".json", ".jsonl", ".lab", ".log", ".lrc", ".md",
    ".npy", ".npz", ".odt", ".pdf", ".pkl", ".pt", ".rtf", ".safetensors", ".srt", ".tsv", ".txt", ".vtt",
    ".xlsx", ".xml", ".yaml", ".zip",
)  # fmt: skip
BAR = 20  # length of the progress bar in characters


@dataclass(frozen=True)
class Input:
    """A recording to process."""

    label: str  # path of the file, or `-` for standard input; also used in messages
    base: Path  # path of the output file in the output folder, without the suffix

    def open(self) -> Path | BinaryIO:
        """Return the source for `load_audio`."""
        return cast(BinaryIO, _StandardInput()) if self.label == STDIN else Path(self.label)


class _StandardInput:
    """Standard input, which is accessed only in `read`, so that an error affects only this recording."""

    name = "standard input"

    def read(self, size: int) -> bytes:
        if sys.stdin is None:
            raise AudioError("standard input is closed")
        return sys.stdin.buffer.read(size)


def find_inputs(
    arguments: Sequence[str], into: str | None, endings: Sequence[str], *, overwrite: bool
) -> tuple[list[Input], dict[str, AudioError]]:
    """Expand arguments (files, folders, patterns, `-` for standard input) into recordings.

    Args:
        into: output folder, or None.
        endings: suffixes of the output files for a recording.
        overwrite: whether output files may replace files next to the recordings.

    Returns:
        The recordings, and one error for each argument that is invalid or matches no audio, and for each
        unreadable folder.

    Raises:
        ConfigError: `into` is empty or not writable, two recordings would be written to the same file, an
            output would overwrite a recording, or standard input is given twice.
    """
    recordings: list[Input] = []
    empty: dict[str, AudioError] = {}
    matches = [match for argument in arguments for match in expand_patterns(argument, empty)]
    for argument in matches:
        if argument == STDIN:
            recordings.append(Input(STDIN, Path("stdin")))
        elif argument == "":
            empty[argument] = AudioError("a file name is empty")
        elif os.path.isdir(argument):
            recordings += _files_in(argument, empty)
        elif "://" in argument:
            empty[argument] = AudioError(f"{argument}: URLs are not supported; download the file first")
        elif argument.endswith(("/", os.sep)) and not os.path.exists(argument):
            empty[argument] = AudioError(f"{argument}: no such folder")
        else:
            recordings.append(Input(argument, Path(Path(argument).stem)))
    if [item.label for item in recordings].count(STDIN) > 1:
        raise ConfigError("standard input (-) can be given only once")
    if into == "":
        raise ConfigError("-o is empty; give a folder")
    if into is not None:
        _check_folder(Path(into), f"-o {into}")
        _check_targets(recordings, into, endings, overwrite)
    return recordings, empty


def _check_targets(recordings: Sequence[Input], into: str, endings: Sequence[str], overwrite: bool) -> None:
    """Check that outputs replace neither each other nor a recording or a file next to it.

    Raises:
        ConfigError: an output file belongs to two recordings, is a recording, or exists next to its
            recording.
    """
    owner: dict[str, str] = {}
    labels = {os.path.realpath(item.label): item.label for item in recordings if item.label != STDIN}
    for item in recordings:
        targets = [Path(into, f"{item.base}{ending}") for ending in endings]
        for target in targets:
            if (path := os.path.normpath(target)) in owner:
                raise ConfigError(
                    f"the results of {owner[path]} and {item.label} would both be written to {target}; "
                    "use two output folders, or give each recording once"
                )
            owner[path] = item.label
            if label := labels.get(os.path.realpath(target)):
                raise ConfigError(f"-o {into} would overwrite the input {label}; give another folder")
            if not overwrite:
                check_not_next_to_recording(target, item.label, f"-o {into}")


def check_not_next_to_recording(target: Path, recording: str, given: str) -> None:
    """Raise ConfigError, with `given` in the message, if the target exists and is next to a recording."""
    if recording == STDIN or not os.path.lexists(target):
        return
    if os.path.realpath(target.parent) == os.path.realpath(Path(recording).parent):
        raise ConfigError(
            f"{given} would replace {target}, which is next to the recording and may belong to it; give "
            "another name or folder, or add --overwrite"
        )


def _files_in(folder: str, empty: dict[str, AudioError]) -> list[Input]:
    """Return the recordings below a folder, and add errors for empty and unreadable folders to `empty`."""
    from jahubert.audio.search import AUDIO_ENDINGS, find_audio

    paths, errors = find_audio(folder)
    for error in errors:
        name = os.fsdecode(error.filename)
        empty[name] = AudioError(f"{name}: this folder cannot be read: {error.strerror}")
    if not paths and not errors:
        empty[folder] = AudioError(f"{folder}: no audio files found (endings: {' '.join(AUDIO_ENDINGS)})")
    return [Input(str(path), path.relative_to(folder).with_suffix("")) for path in paths]


def check_output_file(output: str, inputs: Sequence[str], option: str = "-o") -> None:
    """Check, before any work starts, whether a command can write an output file.

    Args:
        inputs: files that the command reads, or `-`.
        option: the option that gives the file, for messages.

    Raises:
        ConfigError: the name is empty, the path is an input or not a regular file, or its folder is not
            writable.
    """
    if output == "":
        raise ConfigError(f"{option} is empty; give a file")
    _check_not_stdout(output, option)
    path, given = Path(output), f"{option} {output}"
    if path.exists() and not path.is_file():
        raise ConfigError(f"{given} is not a regular file; give another name")
    _check_folder(path.parent, given)
    for name in inputs:
        if name != STDIN and os.path.realpath(name) == os.path.realpath(path):
            raise ConfigError(f"{given} would overwrite the input {name}; give another name")


def check_output_folder(output: str, advice: str) -> None:
    """Raise ConfigError, ending with `advice`, if a new output folder has the name of a file."""
    _check_not_stdout(output, "-o")
    suffix = "" if output.endswith(("/", os.sep)) else Path(output).suffix.lower()
    if suffix in FILE_SUFFIXES and not Path(output).is_dir():
        raise ConfigError(f"-o {output}: {suffix} files are not supported; {advice}")


def _check_not_stdout(output: str, option: str) -> None:
    """Raise ConfigError for `-`, which other tools use for standard output."""
    if output == "-":
        raise ConfigError(
            f"{option} - is not supported; give a file or folder (without -o, transcribe and units print)"
        )


def _check_folder(folder: Path, given: str) -> None:
    """Raise ConfigError, with `given` in the message, if a folder can be neither written to nor created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if existing.is_symlink() and not existing.exists():
        raise ConfigError(f"{given}: {existing} is a broken symbolic link; remove it or give another name")
    if not existing.is_dir():
        raise ConfigError(f"{given}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{given}: no permission to write to {existing}; give another name")


def expand_patterns(argument: str, empty: dict[str, AudioError]) -> list[str]:
    """Expand a pattern that the shell did not expand, and return other arguments unchanged.

    An error for a pattern without matches is added to `empty`.
    """
    if os.path.exists(argument) or not glob.has_magic(argument):
        return [argument]
    paths = sorted(glob.glob(argument, recursive=True))
    if not paths:
        empty[argument] = AudioError(f"{argument}: no file matches this pattern")
    return paths


def needs_names(arguments: Sequence[str]) -> bool:
    """Return whether output lines need the names of recordings, because there may be several."""
    first = arguments[0]
    is_pattern = glob.has_magic(first) and not os.path.exists(first)
    return len(arguments) > 1 or os.path.isdir(first) or is_pattern


class CommandProgress:
    """Progress bar (if standard error is a terminal), error messages and exit status of a command."""

    def __init__(self, inputs: Sequence[Input], empty: dict[str, AudioError]):
        self.n_inputs, self.n_seen, self.failed, self.status = len(inputs) + len(empty), 0, 0, 0
        self.shows, self.label = sys.stderr.isatty(), ""
        self.seconds, self.started = 0.0, time.monotonic()
        for label, error in empty.items():
            self.add_failure(label, error)
            self.add_file(label)

    def add_file(self, label: str) -> None:
        """Count a processed input, successful or not."""
        self.n_seen += 1
        self.label = label
        self.show("\n" if self.n_seen == self.n_inputs else "")

    def add_audio(self, seconds: float) -> None:
        """Add seconds of processed audio."""
        self.seconds += seconds
        self.show()

    def show(self, end: str = "") -> None:
        if not self.shows:
            return
        filled = round(BAR * self.n_seen / max(1, self.n_inputs))
        speed = self.seconds / max(time.monotonic() - self.started, 1e-9)
        minutes, seconds = divmod(round(self.seconds), 60)
        audio = f"  {minutes}:{seconds:02d} of audio, {speed:.0f}x real time" if self.seconds else ""
        bar = f"[{'#' * filled}{'.' * (BAR - filled)}] [{self.n_seen}/{self.n_inputs}]"
        label = printable(self.label).replace("\n", "\\n")
        line = f"{bar}{audio}  {label}"
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be cleared
        print(f"\r\x1b[K{line[:width]}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clear the progress line before other output."""
        if self.shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add_failure(self, label: str, error: Exception) -> None:
        self.clear()
        self.failed += 1
        if not isinstance(error, UserError | OSError):
            traceback.print_exception(error, file=sys.stderr)
        if self.status != 1:
            self.status = exit_status(error)
        message = message_of(error)
        message = message if label in message and label != STDIN else f"{label}: {message}"
        print_error(message.replace("\n", "\\n"))

    def finish(self) -> int:
        if self.failed and self.n_inputs > 1:
            print_error(f"{self.failed} of {self.n_inputs} failed")
        return self.status


def message_of(error: Exception) -> str:
    """Return the message of an error, which for a file system error is the file name and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def print_error(message: object) -> None:
    print(f"jahubert: error: {printable(shorten(str(message), MAX_MESSAGE))}", file=sys.stderr)
