"""The command `jahubert`: transcripts, features and units; what a model or experiment holds; other formats.

Results go to standard output or into the folder given with -o, everything else to standard error. A file that
fails is reported and the others are still done. Exit status: 0 all done, 2 the user can mend what went wrong
(a missing file, a wrong option), 1 an error of the program, 130 interrupted.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jahubert
from jahubert import writers
from jahubert.errors import AudioError, CheckpointError, ConfigError, UserError

AUDIO_ENDINGS = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".w64",
    ".rf64", ".caf", ".sph", ".nist",
)  # fmt: skip
STDIN = "-"
MODEL = "a model folder or file, or a Hub name"  # what stands for a model in the help


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


def model_source(args: argparse.Namespace) -> str | Path:
    """The model asked for, or the built-in one."""
    if args.model is not None:
        return args.model
    from jahubert.transcribe import builtin_model

    found = builtin_model()
    if found is None:
        raise CheckpointError(
            "this installation has no built-in model; name one with --model: a bundle folder that a training "
            "stage wrote, or a Hub name such as owner/model"
        )
    return found


def transcribe(args: argparse.Namespace) -> int:
    formats = list(writers.FORMATS) if args.format == "all" else [args.format]
    inputs, empty = find_inputs(args.audio, args.output, writers.FORMATS[formats[0]][0])
    named = names_wanted(args.audio)
    if args.output is None and (
        args.format == "all" or (named and args.format in ("srt", "vtt", "textgrid"))
    ):
        raise ConfigError(f"-f {args.format} of more than one file or format needs a folder: add -o DIR")
    source = model_source(args)
    from jahubert.transcribe import Transcriber, Transcript

    asr = Transcriber.from_pretrained(source, beam=args.beam, device=args.device)
    report = Report(inputs, empty)
    if args.output is None and args.format == "tsv":
        print(writers.TSV_HEADER, end="")
    found_all = asr.transcribe_many((item.open() for item in inputs), errors="return")
    for item, found in zip(inputs, found_all, strict=True):
        if isinstance(found, Transcript):
            found = replace(found, audio=item.label)
            try:
                if args.output is not None:
                    writers.save(found, Path(args.output, item.base), formats)
            except OSError as error:
                found = error
        if isinstance(found, Exception):
            report.failure(item.label, found)
        elif args.output is None:
            report.clear()
            content = writers.tsv_rows(found) if args.format == "tsv" else writers.render(found, args.format)
            print(
                f"{item.label}\t{content}" if named and args.format == "text" else content, end="", flush=True
            )
        report.seen(item.label)
    return report.finish()


def each(inputs: Sequence[Input], empty: dict[str, AudioError], work: Callable[[Input], str | None]) -> int:
    """Do `work` for every input and print the line that it returns."""
    report = Report(inputs, empty)
    for item in inputs:
        line = None
        try:
            line = work(item)
        except Exception as error:
            report.failure(item.label, error)
        if line is not None:
            report.clear()
            print(line, flush=True)
        report.seen(item.label)
    return report.finish()


def save_array(array: Any, folder: str, item: Input) -> None:
    """Write a tensor as .npy below `folder`; a file is replaced only when the new one is complete."""
    import numpy as np

    path = Path(folder, str(item.base) + ".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.save(file, array.numpy())
    beside.replace(path)


def features(args: argparse.Namespace) -> int:
    inputs, empty = find_inputs(args.audio, args.output, ".npy")
    source = model_source(args)
    from jahubert.extract import FeatureExtractor

    extractor = FeatureExtractor.from_pretrained(
        source, args.layer, device=args.device, chunk_seconds=args.chunk_seconds
    )
    return each(inputs, empty, lambda item: save_array(extractor(item.open()), args.output, item))


def units(args: argparse.Namespace) -> int:
    inputs, empty = find_inputs(args.audio, args.output, ".npy")
    named = names_wanted(args.audio)
    source = model_source(args)
    from jahubert.extract import UnitExtractor

    extractor = UnitExtractor.from_pretrained(source, device=args.device, chunk_seconds=args.chunk_seconds)

    def work(item: Input) -> str | None:
        found = extractor(item.open())
        found = found.unique_consecutive() if args.unique else found
        if args.output is not None:
            save_array(found, args.output, item)
            return None
        line = " ".join(map(str, found.tolist()))
        return f"{item.label}\t{line}" if named else line

    return each(inputs, empty, work)


def info(args: argparse.Namespace) -> int:
    from jahubert.checkpoint import load_bundle

    bundle = load_bundle(args.source)
    n_parameters = sum(p.numel() for p in (bundle.ctc or bundle.model).parameters())
    config, centroids = bundle.config, bundle.centroids_KD
    facts: dict[str, Any] = {
        "model": str(args.source),
        "parameters": n_parameters,
        "layers": config.layers,
        "width": config.width,
        "frames a second": config.grid.rate,
        "normalize": config.normalize,
        "symbols": len(bundle.phonemes) if bundle.phonemes else None,
        "can transcribe": bundle.ctc is not None and bundle.phonemes is not None,
        "units": None if centroids is None else f"{len(centroids)} of layer {bundle.centroid_layer}",
        "codebook": bundle.unit_head.n_units if bundle.unit_head else None,
        "notes": bundle.notes or None,
    }
    origin = {key: value for key, value in bundle.info.items() if key not in ("config", "phonemes")}
    if args.json:
        symbols = list(bundle.phonemes.symbols) if bundle.phonemes else None
        content = {**facts, "symbols": symbols, "config": asdict(config), "origin": origin}
        print(json.dumps(content, ensure_ascii=False, indent=2))
        return 0
    for key, value in {**facts, **origin}.items():
        if value is not None:
            print(f"{key:16} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return 0


def convert(args: argparse.Namespace) -> int:
    if Path(args.source, "units.bin").is_file():
        return convert_labels(args)
    from jahubert import convert as conversion

    done = conversion.convert(args.source, args.target, args.to)
    for note in done.notes:
        print(f"not as it was: {note}")
    print(f"largest absolute difference of the outputs on random audio: {done.difference:.3g}")
    print(f"done: {args.target}")
    return 0


def convert_labels(args: argparse.Namespace) -> int:
    """The units of an experiment into the files that fairseq trains from."""
    if args.to != "fairseq":
        raise ConfigError(f"{args.source} holds units: they can be written with --to fairseq only")
    from jahubert.train.fairseq_files import export
    from jahubert.train.labels import LabelStore
    from jahubert.train.manifest import Manifest

    experiment = Path(args.source).absolute().parent.parent  # of iterN/label
    manifest = Manifest(args.manifest or experiment / "prepare" / "manifest.arrow")
    for split, count in export(manifest, LabelStore(args.source), Path(args.target)).items():
        print(f"{split}: {count} utterances")
    print(f"done: {args.target}")
    return 0


def status(args: argparse.Namespace) -> int:
    from jahubert.train.provenance import status_table

    print(status_table(Path(args.experiment)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jahubert", description="HuBERT and Japanese speech recognition.")
    parser.add_argument("--version", action="version", version=f"jahubert {jahubert.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        sub.set_defaults(run=run)
        return sub

    def audio(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("audio", nargs="+", help="audio files, folders, or - for standard input")
        sub.add_argument("--model", metavar="SRC", help=f"{MODEL} (default: the built-in model)")
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")

    def chunked(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--chunk", dest="chunk_seconds", type=float, metavar="SECONDS",
            help="encode longer recordings in overlapping chunks, which bounds the memory (default: whole)",
        )  # fmt: skip

    sub = command(transcribe, "write down what is said in audio, in kana and phonemes with times")
    audio(sub)
    formats = [*writers.FORMATS, "all"]
    sub.add_argument("-f", "--format", choices=formats, default="text", help="default: text")
    sub.add_argument("-o", "--output", metavar="DIR", help="write one file a recording (and format) there")
    sub.add_argument("--beam", type=int, default=20, metavar="N", help="width of the search (default: 20)")

    sub = command(features, "write the frames of an encoder layer as float32 .npy (frames, dim)")
    audio(sub)
    sub.add_argument("-o", "--output", metavar="DIR", required=True, help="write one .npy a recording there")
    sub.add_argument("--layer", type=int, metavar="N", help="output of block N (default: the last)")
    chunked(sub)

    sub = command(units, "print the discrete units of audio, 50 a second")
    audio(sub)
    sub.add_argument("-o", "--output", metavar="DIR", help="write one int64 .npy a recording there instead")
    sub.add_argument("--unique", action="store_true", help="merge repeated units")
    chunked(sub)

    sub = command(info, "say what a model is")
    sub.add_argument("source", metavar="SRC", help=MODEL)
    sub.add_argument("--json", action="store_true", help="everything, as JSON")

    sub = command(convert, "write a model in another format, read it again and compare; or units for fairseq")
    sub.add_argument("source", metavar="SRC", help=f"{MODEL}; or exp/NAME/iterN/label, its units")
    sub.add_argument("target", metavar="DST", help="new folder (hf, units) or file (fairseq, torchaudio)")
    sub.add_argument("--to", required=True, choices=["hf", "fairseq", "torchaudio"], help="its format")

    sub.add_argument(
        "--manifest", metavar="FILE", help="of the units (default: the experiment's prepare/manifest.arrow)"
    )

    sub = command(status, "say which stages of an experiment are done")
    sub.add_argument("experiment", metavar="EXP", help="its folder, exp/NAME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text, and results are UTF-8 whatever the locale of a pipe is.
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(error)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever reads us has seen enough (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
