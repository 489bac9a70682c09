"""Entry point of the `jahubert` command: transcription, features, units, models and experiments.

Results are written to standard output or to the given path, and everything else to standard error.
Failed files are reported, and the other files are still processed. The exit status is 0 for success, 2 for an
error that the user can fix (a missing file, a wrong option), 1 for an internal error or if a disk or shared
memory is full, 75 if a training run was stopped by a signal, 130 after an interrupt, and 141 if the program
that reads the output ends early.

Heavy packages are imported only when a command needs them, which keeps `--help` fast.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jahubert
from jahubert.cli import language_models
from jahubert.cli.completion import SHELLS, script
from jahubert.cli.console import (
    CommandProgress,
    Input,
    check_output_folder,
    find_inputs,
    message_of,
    needs_names,
    print_error,
)
from jahubert.cli.transcripts import parse_output
from jahubert.errors import (
    AudioError,
    ConfigError,
    MissingExtraError,
    UserError,
    exit_status,
    printable,
)
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference import writers
from jahubert.streams import (
    check_current_folder,
    current_folder_error,
    failed_output,
    is_output_error,
    open_standard_streams,
)

if TYPE_CHECKING:
    from jahubert.cli.feature_files import FeatureFiles
    from jahubert.inference.features import FeatureExtractor

log = logging.getLogger(__name__)

MAX_THREADS = 1024  # maximum number of CPU threads
MAX_BEAM = 1000  # maximum width of the beam, which determines memory and time

# Modules of the extra `train`, and the packages that provide them.
TRAIN_PACKAGES = {
    "hydra": "hydra-core",
    "jiwer": "jiwer",
    "matplotlib": "matplotlib",
    "omegaconf": "hydra-core",
    "pyarrow": "pyarrow",
    "tqdm": "tqdm",
    "yaml": "hydra-core",
}

# Type of a function that adds a subcommand, given the function to run and a short description.
Command = Callable[[Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
PLAN = (
    "settings of jahubert run; gpus=N (default: the setting processes), gpu=NAME (default: this machine's), "
    "utilization=X (fraction of the 16-bit peak), hours=H (of speech; default: from the prepared corpus or "
    "the recipe)"
)
BUILTIN_NOTE = (
    "transcribing with the built-in model, a small one for trying jahubert on clear Japanese speech; for "
    "other purposes, fine-tune a model on your speakers and give it with --model"
)
MODEL = "a model folder or file, or a Hub name"  # help text for model arguments
CORPUS_FORMATS = ("kaldi", "lhotse", "datasets")  # the formats that train/data/export.py supports


def fusion_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the language model options that were given on the command line."""
    names = ("lm", "lexicon", "lm_weight", "word_bonus")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return options | ({"lm": None} if args.no_lm else {})


def transcribe(args: argparse.Namespace) -> int:
    for option, file in (("--lm", args.lm), ("--lexicon", args.lexicon), ("--calibration", args.calibration)):
        if file == "":
            raise ConfigError(f"{option} is empty; give a file")
    output = parse_output(args)
    inputs, empty = find_inputs(args.audio, output.folder, output.endings, overwrite=args.overwrite)
    import torch

    from jahubert.inference.confidence import read_calibration
    from jahubert.inference.transcribe import Transcriber

    options = fusion_options(args)
    if args.calibration is not None:
        options["calibration"] = read_calibration(Path(args.calibration))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    asr = Transcriber.from_pretrained(
        args.model,
        beam=args.beam,
        device=args.device,
        vad={"builtin": True, "silero": "silero", "off": False}[args.vad],
        conditioning=not args.no_conditioning,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        **options,
    )
    if args.model is None:
        print(BUILTIN_NOTE, file=sys.stderr)
    progress = CommandProgress(inputs, empty)
    writer = output.make_writer(progress)
    transcripts = asr.transcribe_many(
        (item.open() for item in inputs),
        errors="return",
        progress=progress.add_audio,
        on_segment=writer.add_segment,
    )
    for item in inputs:
        writer.start(item)
        result = next(transcripts)
        if isinstance(result, OSError) and is_output_error(result):
            raise result  # a segment of a long recording could not be printed
        if isinstance(result, Exception):
            progress.add_failure(item.label, result)
        else:
            writer.write(replace(result, audio=item.label))
        progress.add_file(item.label)
    return progress.finish()


def for_each_input(
    inputs: Sequence[Input], empty: dict[str, AudioError], work: Callable[[Input], str | None]
) -> int:
    """Call `work` for every input, print the lines that the calls return, and return the exit status."""
    progress = CommandProgress(inputs, empty)
    for item in inputs:
        line = None
        try:
            line = work(item)
        except Exception as error:
            progress.add_failure(item.label, error)
        if line is not None:
            progress.clear()
            print(line, flush=True)
        progress.add_file(item.label)
    return progress.finish()


def features(args: argparse.Namespace) -> int:
    from jahubert.cli.feature_files import SINGLE, check_keys, feature_files, parts_folder

    if Path(args.output).suffix != SINGLE:
        check_output_folder(args.output, f"give a folder or a {SINGLE} file for the features")
    inputs, empty = find_inputs(args.audio, str(parts_folder(Path(args.output))), [".npy"], overwrite=True)
    check_keys(Path(args.output), (item.base for item in inputs))
    import torch

    from jahubert.formats.bundle import weights_hash
    from jahubert.inference.features import FeatureExtractor

    extractor = FeatureExtractor.from_pretrained(
        args.model, args.layer, weights=args.weights, device=args.device, dtype=getattr(torch, args.dtype),
        chunk_seconds=args.chunk_seconds,
    )  # fmt: skip
    names = ("layer", "weights", "dtype", "chunk_seconds")
    settings = {"model": weights_hash(extractor.model)} | {name: getattr(args, name) for name in names}
    with feature_files(Path(args.output), settings, [item.base for item in inputs]) as files:
        return compute_features(files, extractor, inputs, empty)


def compute_features(
    files: FeatureFiles, extractor: FeatureExtractor, inputs: Sequence[Input], empty: dict[str, AudioError]
) -> int:
    """Compute and write the features that do not exist yet, and return the exit status."""
    progress = CommandProgress(inputs, empty)
    todo = [item for item in inputs if not files.has(item.base, item.label)]
    if n_existing := len(inputs) - len(todo):
        print(f"the features of {n_existing} of {len(inputs)} recordings already exist", file=sys.stderr)
        progress.n_seen += n_existing
    whole = extractor.many((item.open() for item in todo), errors="return") if todo else iter(())
    for item in todo:
        try:
            if extractor.chunk_seconds is None:
                result = next(whole)
                if isinstance(result, Exception):
                    raise result
                pieces: Iterable[Any] = [result]
            else:
                pieces = extractor.stream(item.open())
            if not files.write(item.base, pieces, extractor.features.shape):
                warn_without_frames(item, extractor.grid)
        except Exception as error:
            progress.add_failure(item.label, error)
        progress.add_file(item.label)
    if not progress.failed:
        files.finish(item.base for item in inputs)
    elif files.folder != files.output:
        print_error(
            f"{files.output} was not written, because at least one input failed; all other features are "
            f"kept in {files.folder}. Rerun the command after fixing the failed inputs, or without them."
        )
    return progress.finish()


def units(args: argparse.Namespace) -> int:
    if args.output is not None:
        check_output_folder(args.output, "give a folder for the units")
    inputs, empty = find_inputs(args.audio, args.output, [".npy"], overwrite=args.overwrite)
    named = needs_names(args.audio)
    from jahubert.cli.feature_files import RECORD, save_array
    from jahubert.inference.features import UnitExtractor

    if args.output is not None and Path(args.output, RECORD).exists():
        raise ConfigError(
            f"-o {args.output} contains the output of jahubert features; use another folder for the units"
        )

    extractor = UnitExtractor.from_pretrained(
        args.model, device=args.device, chunk_seconds=args.chunk_seconds
    )

    # With chunks, recordings are processed one by one, because they may be too long to be prefetched.
    sources = (item.open() for item in inputs)
    whole = extractor.many(sources, errors="return") if args.chunk_seconds is None else None

    def work(item: Input) -> str | None:
        unit_ids = extractor(item.open()) if whole is None else next(whole)
        if isinstance(unit_ids, Exception):
            raise unit_ids
        if not len(unit_ids):
            warn_without_frames(item, extractor.features.grid)
        unit_ids = unit_ids.unique_consecutive() if args.unique else unit_ids
        if args.output is not None:
            save_array(unit_ids, Path(args.output, f"{item.base}.npy"))
            return None
        line = " ".join(map(str, unit_ids.tolist()))
        return f"{writers.escape_controls(item.label)}\t{line}" if named else line

    return for_each_input(inputs, empty, work)


def warn_without_frames(item: Input, grid: FrameGrid) -> None:
    """Log a warning for a recording that is shorter than a frame, for which the output is empty."""
    name, seconds = printable(item.label), grid.window / SAMPLE_RATE
    log.warning("%s: the audio is shorter than a frame (%.3f s), so the output is empty", name, seconds)


def info(args: argparse.Namespace) -> int:
    from jahubert.formats.bundle import load_bundle
    from jahubert.formats.hub import model_name

    bundle = load_bundle(args.source)
    n_parameters = sum(p.numel() for p in (bundle.ctc or bundle.model).parameters())
    config, centroids = bundle.config, bundle.centroids_KD
    facts: dict[str, Any] = {
        "model": model_name(args.source),
        "parameters": n_parameters if args.json else f"{n_parameters:,}",
        "layers": config.layers,
        "width": config.width,
        "frames per second": config.grid.rate,
        "normalize": config.normalize,
        "symbols": len(bundle.phonemes) if bundle.phonemes else None,
        "can transcribe": bundle.ctc is not None and bundle.phonemes is not None,
        "units": None if centroids is None else f"{len(centroids)} of layer {bundle.centroid_layer}",
        "codebook": bundle.unit_head.n_units if bundle.unit_head else None,
        "checksums": f"of {len(bundle.info['files'])} files verified" if "files" in bundle.info else None,
        "notes": bundle.notes or None,
    }
    hidden = ("config", "phonemes", "files", "checksum")
    origin = {key: value for key, value in bundle.info.items() if key not in hidden}
    if args.json:
        symbols = list(bundle.phonemes.symbols) if bundle.phonemes else None
        content = {**facts, "symbols": symbols, "config": asdict(config), "origin": origin}
        print(printable(json.dumps(content, ensure_ascii=False, indent=2)))
        return 0
    for key, value in {**facts, **origin}.items():
        inner = value if isinstance(value, dict) else {}
        if value is not None:
            print(printable(f"{key:16} {_shown(value)}".rstrip() if not inner else key))
        for name, each in inner.items():
            print(printable(f"  {name:14} {_shown(each)}"))
    return 0


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def convert(args: argparse.Namespace) -> int:
    if args.calibration is not None and args.to != "hf":
        raise ConfigError(f"--calibration applies only to --to hf, not to --to {args.to}")
    if Path(args.source, "units.bin").is_file():
        return convert_labels(args)
    if args.manifest is not None:
        raise ConfigError(f"--manifest applies only to units, but {args.source} contains no units.bin")
    if args.to in CORPUS_FORMATS:
        return export_corpus(args)
    from jahubert.formats import convert as conversion

    calibration = None
    if args.calibration is not None:
        from jahubert.inference.confidence import read_calibration

        calibration = read_calibration(Path(args.calibration)).to_json()
    done = conversion.convert(args.source, args.target, args.to, calibration)
    for note in done.notes:
        print(f"changed: {note}")
    print(f"largest absolute difference of outputs on random audio: {done.difference:.3g}")
    print(f"done: {args.target}")
    return 0


def convert_labels(args: argparse.Namespace) -> int:
    """Export the units in the folder of a label stage as training files for fairseq."""
    if args.to != "fairseq":
        raise ConfigError(f"{args.source} contains units, which can only be converted with --to fairseq")
    from jahubert.train.data.fairseq_files import export_experiment

    for split, count in export_experiment(args.source, args.target, args.manifest).items():
        print(f"{split}: {count} utterances")
    print(f"done: {args.target}")
    return 0


def export_corpus(args: argparse.Namespace) -> int:
    """Export a prepared corpus in the format of another toolkit."""
    from jahubert.train.data import export
    from jahubert.train.data.manifest import Manifest

    source = Path(args.source)
    manifest = Manifest.verified(source / "manifest.arrow" if source.is_dir() else source)
    for split, count in export.export_corpus(manifest, Path(args.target), args.to).items():
        print(f"{split}: {count} utterances")
    print(f"done: {args.target}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Serve as a placeholder for help and completion. `main` passes the arguments to `jahubert.run`."""
    raise NotImplementedError


def plan(args: argparse.Namespace) -> int:
    from jahubert.train.pipeline.compose import compose
    from jahubert.train.pipeline.jobs import configure_jobs
    from jahubert.train.plan import estimate

    options, overrides = estimate.split_settings(args.settings)
    planned = estimate.make_plan(compose(overrides), configure_jobs(overrides), options)
    shown = json.dumps(estimate.plan_json(planned), indent=2) if args.json else estimate.plan_table(planned)
    print(printable(shown))
    return 0


def status(args: argparse.Namespace) -> int:
    from jahubert.train.experiment.provenance import stage_states, status_table

    states = stage_states(Path(args.experiment))
    print(printable(json.dumps(states, ensure_ascii=False, indent=2) if args.json else status_table(states)))
    return 0


def completion(args: argparse.Namespace) -> int:
    print(script(build_parser(), args.shell), end="")
    return 0


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def between_1_and(maximum: int) -> Callable[[str], int]:
    """Return a function that parses a whole number from 1 to `maximum`."""

    def number(text: str) -> int:
        value = int(text)
        if not 1 <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be between 1 and {maximum}, but is {text}")
        return value

    return number


def transcript_format(text: str) -> str:
    """Parse the name of a format, ignoring case. `txt` is an alias of `text`."""
    return "text" if text.lower() == "txt" else text.lower()


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors that suggest the nearest option name."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
            if unknown:
                raise ConfigError("; ".join(self._unknown(word, parsed.command) for word in unknown))
        except ConfigError as error:
            files = [word for word in args or () if word.startswith("-") and os.path.isfile(word)]
            if files:
                raise ConfigError(f"{files[0]} is read as an option; write ./{files[0]}") from error
            raise
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _unknown(self, word: str, command: str) -> str:
        (commands,) = (each for each in self._actions if isinstance(each, argparse._SubParsersAction))
        actions = commands.choices[command]._actions
        options = [name for action in actions for name in action.option_strings if name.startswith("--")]
        matches = difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.6)
        hint = f"did you mean {matches[0]}?" if matches else f"see {self.prog} {command} --help"
        return f"{word}: no such option; {hint}"


def layers(text: str) -> int | list[int] | str:
    """Parse layers, given as `6`, `3,6,9` or `all`."""
    if text == "all":
        return text
    indices = [int(part) for part in text.split(",")]
    return indices if "," in text else indices[0]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="jahubert", description="HuBERT and Japanese speech recognition.")
    parser.add_argument("--version", action="version", version=f"jahubert {jahubert.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        sub.set_defaults(run=run)
        return sub

    audio_commands(command)
    model_commands(command)
    language_models.add_commands(command)
    experiment_commands(command)
    return parser


def audio_commands(command: Command) -> None:
    """Add the subcommands that read recordings."""

    def audio(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "audio", nargs="+", help="audio files, folders, quoted patterns, or - for standard input"
        )
        sub.add_argument("--model", metavar="SRC", help=f"{MODEL} (default: the built-in model)")
        sub.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the GPU if available)")

    def chunked(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--chunk", dest="chunk_seconds", type=float, metavar="SECONDS",
            help="encode longer recordings in overlapping chunks to limit memory (default: no chunks)",
        )  # fmt: skip

    def overwrites(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--overwrite", action="store_true", help="let -o replace files next to the recordings"
        )

    def dtype(sub: argparse.ArgumentParser, default: str, *more: str) -> None:
        names = [*dict.fromkeys([default, "float32", "bfloat16", "float16", *more])]
        auto = "auto, bfloat16 where the device is faster with it" if default == "auto" else default
        sub.add_argument(
            "--dtype", choices=names, default=default, help=f"dtype of the computation (default: {auto})"
        )

    sub = command(transcribe, "transcribe audio to kana and phonemes with times")
    audio(sub)
    # Whisper's option names are accepted as aliases.
    formats = [*writers.FORMATS, "all"]
    sub.add_argument(
        "-f", "--format", "--output_format", "--output-format", type=transcript_format, choices=formats,
        metavar="FORMAT", help=f"{', '.join(formats)} (default: from the suffix of -o, else text)",
    )  # fmt: skip
    sub.add_argument(
        "-o", "--output", "--output_dir", "--output-dir", metavar="OUT",
        help="a folder for one file per recording and format, or a file such as out.srt",
    )  # fmt: skip
    overwrites(sub)
    sub.add_argument(
        "--beam", "--beam_size", "--beam-size", type=between_1_and(MAX_BEAM), default=20, metavar="N",
        help=f"width of the beam search, at most {MAX_BEAM} (default: 20)",
    )  # fmt: skip
    sub.add_argument("--language", type=str.lower, choices=["ja", "japanese"], help=argparse.SUPPRESS)
    sub.add_argument("--task", choices=["transcribe"], help=argparse.SUPPRESS)
    lm = sub.add_mutually_exclusive_group()
    lm.add_argument(
        "--lm", metavar="FILE",
        help="n-gram model in ARPA format, over the model's symbols or the words in --lexicon (see jahubert "
        "ngram; default without --lexicon: the n-gram of the model, if it has one)",
    )  # fmt: skip
    lm.add_argument("--no-lm", action="store_true", help="do not use the n-gram of the model")
    sub.add_argument(
        "--lexicon", metavar="FILE", help="recognize only the words in FILE and write them as spelled there"
    )
    sub.add_argument(
        "--lm-weight", type=float, metavar="W", help="n-gram weight (default: that of the model, or 0.5)"
    )
    sub.add_argument(
        "--word-bonus", type=float, metavar="B",
        help="score added per word, or per symbol without --lexicon (default: that of the model, or 0)",
    )  # fmt: skip
    sub.add_argument(
        "--calibration", metavar="FILE",
        help="calibration of confidences, fitted to the same search by the score stage (default: that of the "
        "model, if it has one, unless other options change the search)",
    )  # fmt: skip
    sub.add_argument(
        "--threads", type=between_1_and(MAX_THREADS), metavar="N", help="CPU threads (default: all cores)"
    )
    sub.add_argument("--phonemes", action="store_true", help="write phonemes instead of kana")
    sub.add_argument(
        "--vad", choices=["builtin", "silero", "off"], default="builtin",
        help="voice activity detection; silero is a neural network for noisy recordings (extra vad required)",
    )  # fmt: skip
    sub.add_argument("--no-vad", dest="vad", action="store_const", const="off", help="same as --vad off")
    sub.add_argument(
        "--no-conditioning", action="store_true",
        help="do not remove DC offset and hum, and do not normalize the level of speech",
    )  # fmt: skip
    dtype(sub, "auto", "int8")

    sub = command(features, "write features from encoder layers as float32 arrays (frames, dim)")
    audio(sub)
    sub.add_argument(
        "-o", "--output", metavar="OUT", required=True,
        help="a folder for one .npy file per recording, or a single .safetensors file",
    )  # fmt: skip
    sub.add_argument(
        "--layer", type=layers, metavar="N",
        help="encoder layer (default: the encoder's output); 3,6,9 or all gives (frames, layers, dim)",
    )  # fmt: skip
    sub.add_argument(
        "--weights",
        type=numbers,
        metavar="W,W",
        help="one weight per layer, to write a weighted sum (for a negative first weight: --weights=-W,W)",
    )
    dtype(sub, "float32")
    chunked(sub)

    sub = command(units, "print the discrete units of audio, 50 per second")
    audio(sub)
    sub.add_argument("-o", "--output", metavar="DIR", help="write one int64 .npy file per recording instead")
    sub.add_argument("--unique", action="store_true", help="merge consecutive equal units")
    overwrites(sub)
    chunked(sub)


def model_commands(command: Command) -> None:
    """Add the subcommands for models."""
    sub = command(info, "show model information")
    sub.add_argument("source", nargs="?", metavar="SRC", help=f"{MODEL} (default: the built-in model)")
    sub.add_argument("--json", action="store_true", help="print all information as JSON")

    sub = command(convert, "convert a model and verify the result, or export units or a corpus")
    sub.add_argument(
        "source",
        metavar="SRC",
        help=f"{MODEL}; units (exp/NAME/iterN/label); or a corpus (exp/NAME/prepare)",
    )
    sub.add_argument("target", metavar="DST", help="new folder (hf, units, corpus) or file (.pt, .onnx)")
    sub.add_argument(
        "--to",
        required=True,
        choices=["hf", "fairseq", "torchaudio", "onnx", *CORPUS_FORMATS],
        help="target format",
    )
    sub.add_argument(
        "--manifest",
        metavar="FILE",
        help="manifest of the units (default: exp/NAME/prepare/manifest.arrow)",
    )
    sub.add_argument(
        "--calibration",
        metavar="FILE",
        help="with --to hf: calibration of confidences to store in the model, from a score stage",
    )


def experiment_commands(command: Command) -> None:
    """Add the subcommands for experiments and shell completion."""
    sub = command(
        run, "run stages of an experiment: prepare, pretrain, finetune, ... (same as python -m jahubert.run)"
    )
    sub.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings such as recipe=NAME and stage=NAME"
    )
    sub = command(plan, "estimate the time, disk space and memory that stages need")
    sub.add_argument("settings", nargs="+", metavar="KEY=VALUE", help=PLAN)
    sub.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes and times in hours")

    sub = command(status, "show which stages of an experiment are done")
    sub.add_argument("experiment", metavar="EXP", help="experiment folder, exp/NAME")
    sub.add_argument("--json", action="store_true", help="print the state of each stage as JSON")

    sub = command(completion, "print a script that completes this command in your shell")
    sub.add_argument("shell", choices=SHELLS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    if argv[:1] == ["run"]:
        from jahubert.run import main as run_stages

        return run_stages(argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text. Files and pipes receive UTF-8 regardless of the locale.
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        check_current_folder()
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print_error(error)
        return error.exit_status
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_PACKAGES:
            raise
        print_error(MissingExtraError(TRAIN_PACKAGES[package], "train"))
        return MissingExtraError.exit_status
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if is_output_error(error):
            return failed_output(error)
        cause = current_folder_error() or error
        print_error(message_of(cause))
        return exit_status(cause)
