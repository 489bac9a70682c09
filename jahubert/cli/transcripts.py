"""Output of `jahubert transcribe`: one file, a folder with files, or standard output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jahubert.cli.console import (
    CommandProgress,
    Input,
    check_not_next_to_recording,
    check_output_file,
    check_output_folder,
    needs_names,
)
from jahubert.errors import ConfigError
from jahubert.inference import writers

if TYPE_CHECKING:
    from jahubert.inference.transcribe import Transcript, TranscriptSegment, Word

WHOLE_FILE_FORMATS = ("srt", "vtt", "textgrid", "audacity")  # these cannot be printed for several recordings


@dataclass(frozen=True)
class Output:
    """Destination and formats of the transcripts."""

    formats: list[str]
    phonemes: bool
    named: bool  # whether lines need the names of recordings, because there may be several
    file: Path | None = None  # with neither file nor folder, transcripts are printed
    folder: str | None = None

    @property
    def endings(self) -> list[str]:
        """Suffixes of the files of one recording in the folder."""
        return [writers.FORMATS[name][0] for name in self.formats]

    def make_writer(self, progress: CommandProgress) -> TranscriptWriter:
        """Create the writer for the destination, and print the header, if any, to standard output."""
        if self.file is not None or self.folder is not None:
            return FileWriter(self, progress)
        (format,) = self.formats
        if format == "text":
            return TextPrinter(self.phonemes, self.named, progress)
        if format == "tsv":
            print(writers.TSV_HEADER, end="")  # one header for all recordings
            return Printer(writers.tsv_rows, progress)
        return Printer(partial(writers.render, format=format, phonemes=self.phonemes), progress)

    def save(self, transcript: Transcript, base: Path) -> None:
        """Write a transcript to the file, or to files in the folder with the path `base` plus suffixes."""
        if self.file is not None:
            writers.save_file(transcript, self.file, self.formats[0], self.phonemes)
        elif self.folder is not None:
            writers.save(transcript, Path(self.folder, base), self.formats, self.phonemes)


def parse_output(args: argparse.Namespace) -> Output:
    """Determine the destination and formats from the arguments of `jahubert transcribe`, and check them.

    Raises:
        ConfigError: the format does not match the suffix of the output file or cannot be printed, a file is
            given for several recordings, or the file cannot be written or has an unsupported suffix.
    """
    format, is_file = output_format(args.output, args.format)
    formats = list(writers.FORMATS) if format == "all" else [format]
    named = needs_names(args.audio)
    if is_file:
        if named:
            raise ConfigError(
                f"-o {args.output} is a file, but there may be several recordings; give a folder"
            )
        check_output_file(
            args.output, [*args.audio, *filter(None, (args.lm, args.lexicon, args.calibration))]
        )
        if not args.overwrite:
            for recording in args.audio:
                check_not_next_to_recording(Path(args.output), recording, f"-o {args.output}")
        return Output(formats, args.phonemes, named, file=Path(args.output))
    if args.output is not None:
        suffixes = ", ".join(suffix for suffix, _ in writers.FORMATS.values())
        check_output_folder(args.output, f"give a folder, or a file that ends in {suffixes}")
    if args.output is None and format == "all":
        raise ConfigError("-f all writes several files: add -o DIR")
    if args.output is None and named and format in WHOLE_FILE_FORMATS:
        raise ConfigError(f"-f {format} needs a folder if there may be several recordings: add -o DIR")
    return Output(formats, args.phonemes, named, folder=args.output)


def output_format(output: str | None, format: str | None) -> tuple[str, bool]:
    """Return the format and whether `output` is a file, that is, has the suffix of a format.

    The format is that of the suffix, or else `format` (default: text).

    Raises:
        ConfigError: the suffix contradicts `format`.
    """
    if output is None or output.endswith(("/", os.sep)) or Path(output).is_dir():
        return format or "text", False
    suffixes = {suffix.lower(): name for name, (suffix, _) in writers.FORMATS.items()}
    matches = [suffix for suffix in suffixes if output.lower().endswith(suffix)]
    if not matches:
        return format or "text", False
    format_of_suffix = suffixes[max(matches, key=len)]
    if format not in (None, format_of_suffix):
        raise ConfigError(f"-o {output} has the suffix of {format_of_suffix}, but -f asks for {format}")
    return format_of_suffix, True


class TranscriptWriter:
    """Base class of the writers. The command calls `start`, `add_segment` and `write` for each recording.

    If a file cannot be written, the recording is reported as failed, and the others are still processed. An
    error of standard output ends the command.
    """

    def start(self, item: Input) -> None:
        """Prepare for a recording."""

    def add_segment(self, segment: TranscriptSegment) -> None:
        """Process a segment of a long recording while the rest is still being recognized."""

    def write(self, transcript: Transcript) -> None:
        """Write the complete transcript, whose `audio` is the label of the recording."""
        raise NotImplementedError


@dataclass
class FileWriter(TranscriptWriter):
    """Writer of each transcript to the file or the folder of an `Output`."""

    output: Output
    progress: CommandProgress

    def start(self, item: Input) -> None:
        self.base = item.base

    def write(self, transcript: Transcript) -> None:
        try:
            self.output.save(transcript, self.base)
        except OSError as error:
            self.progress.add_failure(transcript.audio, error)


@dataclass
class Printer(TranscriptWriter):
    """Printer of complete transcripts in the format of `render`."""

    render: Callable[[Transcript], str]
    progress: CommandProgress

    def write(self, transcript: Transcript) -> None:
        self.progress.clear()
        print(self.render(transcript), end="", flush=True)


@dataclass
class TextPrinter(TranscriptWriter):
    """Printer of one line of text per segment, as soon as the segment is recognized."""

    phonemes: bool
    named: bool
    progress: CommandProgress

    def start(self, item: Input) -> None:
        self.prefix = f"{writers.escape_controls(item.label)}\t" if self.named else ""
        self.n_printed = 0  # number of segments of this recording

    def add_segment(self, segment: TranscriptSegment) -> None:
        from jahubert.inference.transcribe import Transcript

        self._print(Transcript(segment.words, segment.end, 0.0))
        self.n_printed += 1

    def write(self, transcript: Transcript) -> None:
        if not self.n_printed:
            self._print(transcript)

    def _print(self, transcript: Transcript) -> None:
        if sys.stdout.isatty():
            transcript = mark_uncertain(transcript)
        content = writers.render(transcript, "text", self.phonemes)
        lines = content.removesuffix("\n").split("\n")
        self.progress.clear()
        print("".join(f"{self.prefix}{line}\n" for line in lines), end="", flush=True)


def mark_uncertain(transcript: Transcript) -> Transcript:
    """Append (?) to the words that are more likely wrong than correct."""
    from jahubert.inference.confidence import LOW_CONFIDENCE

    def marked(word: Word) -> Word:
        return replace(
            word,
            kana=word.kana + "(?)",
            written=word.written and word.written + "(?)",
            phonemes=(*word.phonemes[:-1], word.phonemes[-1] + "(?)"),
        )

    words = (marked(word) if word.confidence < LOW_CONFIDENCE else word for word in transcript.words)
    return replace(transcript, words=tuple(words))
