"""Check that several kinds of damage to the files of a tiny experiment are detected.

    python tools/checks/corruption_sweep.py               # 5 trials per file and kind of damage
    python tools/checks/corruption_sweep.py --trials 1

Files that later stages or commands read are damaged, and then read with the code of these stages and
commands. The kinds of damage are a flipped bit, a zeroed block, a missing tail, and a swap with the same file
from an experiment with a different seed. The input verification of all stages reads the files of stages,
`Transcriber` and `load_bundle` read bundles, the code for resuming reads checkpoints and unfinished stages,
and the decoder reads FLAC files. Lexicons and n-grams are read by the stage that used them and, if
compressed, by their readers. Damage counts as detected if it causes an error that names the file, its folder
or its setting, or if a stage computes the damaged part again. It counts as harmless if the content is read
correctly. The script prints the figures for each kind of file, and its exit status is 1 if any damage is
neither detected nor harmless. The recordings are not damaged, nor are files that no stage reads: TensorBoard
events, started.json of a finished stage, the model card and the report.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import logging
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from small_experiment import NGRAM, contents, stage_jobs, write_language_models, write_model

from jahubert.audio import load_audio
from jahubert.errors import UserError
from jahubert.formats.bundle import load_bundle
from jahubert.formats.model_files import INFO
from jahubert.inference.transcribe import Transcriber
from jahubert.lm.arpa import read_arpa
from jahubert.lm.lexicon import read_lexicon
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.fairseq_files import export_experiment
from jahubert.train.data.flac import write_flac
from jahubert.train.data.labels import LabelWriter
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.training_text import training_sentences
from jahubert.train.experiment.config import input_fields
from jahubert.train.experiment.provenance import DONE, read_record, stage_states
from jahubert.train.experiment.registry import Job
from jahubert.train.pipeline.runner import run_stage, verify_inputs
from jahubert.train.stages import features
from jahubert.train.text.tokens import Tokenizer
from jahubert.train.trainer.checkpoints import checkpoint_damage

UNREAD = ("started.json", "events.out.tfevents")
BLOCK = 64  # number of bytes in a zeroed block
# Commands that read outputs of stages that are not bundles. `convert` and `plan` read the manifest.
EXPERIMENT_READERS = ("run", "convert", "ngram", "plan", "status")
BUNDLE_READERS = ("transcribe", "features", "units", "info", "convert")
NGRAM_READERS = ("transcribe", "perplexity", "run")
NO_READERS = ("completion",)
HARMLESS = "harmless"  # returned by `read` instead of a message


def flip_bit(content: bytes, other: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zero_block(content: bytes, other: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content[start : start + BLOCK])) + content[start + BLOCK :]


def cut_tail(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def swap(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return other


Damage = Callable[[bytes, bytes, random.Random], bytes]
DAMAGES: tuple[Damage, ...] = (flip_bit, zero_block, cut_tail, swap)


class Sweep:
    """Numbers of trials and of detected cases of damage, per kind of file."""

    def __init__(self, trials: int):
        self.trials = trials
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.missed: list[str] = []

    def damage(
        self,
        kind: str,
        path: Path,
        other: Path,
        read: Callable[[], str],
        damages: Sequence[Damage] = DAMAGES,
    ) -> None:
        """Damage a file in several ways. `read` returns an error message, HARMLESS or an empty string."""
        content, rng = path.read_bytes(), random.Random(str(path.name))
        for damage in damages:
            for _ in range(1 if damage is swap else self.trials):
                damaged = damage(content, other.read_bytes(), rng)
                if damaged == content:
                    continue
                path.write_bytes(damaged)
                self.counts[kind][damage.__name__] += 1
                message = read()
                if message == HARMLESS or path.name in message or path.parent.name in message:
                    self.counts[kind]["harmless" if message == HARMLESS else "detected"] += 1
                else:
                    self.missed.append(f"{path}, {damage.__name__}: {message or 'not detected'}")
        path.write_bytes(content)

    def report(self) -> None:
        for kind, counts in self.counts.items():
            total = sum(counts[damage.__name__] for damage in DAMAGES)
            shown = ", ".join(f"{damage.__name__} {counts[damage.__name__]}" for damage in DAMAGES)
            harmless = f", {counts['harmless']} harmless" if counts["harmless"] else ""
            print(f"{kind}: {counts['detected']} of {total} detected{harmless} ({shown})")
        print(*self.missed, sep="\n")


def error_of(read: Callable[[], object]) -> str:
    """Return the message of the error that `read` raises, or an empty string."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def files_of(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(UNREAD) and path.stat().st_size:
            yield path


def sweep_stages(sweep: Sweep, exp: Path, other: Path) -> None:
    """Damage the files of all stages. The first stage that reads a file, or else `report`, verifies it."""
    *jobs, report = stage_jobs(exp)
    for job in jobs:
        for path in files_of(job.out):
            counterpart = other / path.relative_to(exp)
            if "work" in path.parts or not counterpart.exists():
                continue
            if "checkpoints" in path.parts:
                sweep.damage("checkpoints", path, counterpart, partial(checkpoint_damage, path.parent, True))
                continue
            readers = [reader for reader in jobs if _reads(reader, path)]
            damages = [d for d in DAMAGES if d is not swap or not _records_equal_files(path, counterpart)]
            sweep.damage(job.stage, path, counterpart, partial(_verify, (readers or [report])[0]), damages)


def _reads(job: Job, path: Path) -> bool:
    inputs = [folder for _, folder, _ in input_fields(job.config)]
    return any(folder in (path, *path.parents) for folder in inputs)


def _records_equal_files(path: Path, other: Path) -> bool:
    """Return whether two files are records of stages with equal outputs, for which a swap is harmless."""
    return path.name == DONE and read_record(path)["outputs"] == read_record(other)["outputs"]


def _verify(job: Job) -> str:
    return error_of(lambda: verify_inputs(job.config))


def sweep_bundles(sweep: Sweep, exp: Path, other: Path) -> None:
    for folder in (exp, other):
        write_model(folder, folder / "recognizer")
    for bundle in sorted(path.parent for path in exp.rglob(INFO)):
        read = Transcriber.from_pretrained if bundle.name == "recognizer" else load_bundle
        for path in files_of(bundle):
            if path.name != "README.md":  # no code reads the model card
                check = partial(error_of, partial(read, bundle))  # type: ignore[arg-type]
                sweep.damage("bundles", path, other / path.relative_to(exp), check)


def sweep_unfinished(sweep: Sweep, exp: Path) -> None:
    """Damage the files of unfinished stages, which must then report an error or end with the same results."""
    for stage, owner, last in (("features", features, "write_json"), ("label", LabelWriter, "finish")):
        job = next(job for job in stage_jobs(exp) if job.stage == stage)
        unfinished, expected = exp / f"unfinished-{stage}", contents(job.out)
        with suppress(KeyboardInterrupt), patch.object(owner, last, side_effect=KeyboardInterrupt):
            run_stage(job.stage, job.config, unfinished)

        def resume(path: Path, job: Job = job, folder: Path = unfinished, expected: dict = expected) -> str:
            copy = Path(shutil.copytree(folder, exp / "resumed"))
            message = error_of(lambda: run_stage(job.stage, job.config, copy))
            is_equal = not message and contents(copy) == expected
            shutil.rmtree(copy)
            return path.name if is_equal else message

        for path in files_of(unfinished):
            sweep.damage(f"unfinished {stage}", path, path, partial(resume, path))


def sweep_language_models(sweep: Sweep, exp: Path) -> None:
    """Damage lexicons and n-grams, which are read by a rerun of stage decode and by their readers."""
    decode = next(job for job in stage_jobs(exp) if job.out.name == f"decode-{NGRAM}")
    ngram, words, compressed = decode.config.lm, decode.config.lexicon, exp / "words.txt.gz"
    for path, setting in ((ngram, "decode.lm"), (words, "decode.lexicon")):

        def rerun(name: str = path.name, setting: str = setting) -> str:
            return error_of(lambda: run_stage(*decode)).replace(f"{setting} was", name)

        sweep.damage("inputs of decode", path, exp / "phones.arpa.gz", rerun)
    compressed.write_bytes(gzip.compress(words.read_bytes()))
    symbols = PhonemeSet.standard()
    readers: tuple[tuple[Path, Callable[[], Any]], ...] = (
        (ngram, lambda: pickle.dumps(read_arpa(ngram))),
        (compressed, lambda: read_lexicon(compressed, symbols)),
    )
    damages = [damage for damage in DAMAGES if damage is not swap]  # the readers accept any intact file
    for path, read in readers:
        expected = read()

        def check(read: Callable[[], Any] = read, expected: Any = expected) -> str:
            return error_of(lambda: check_equal(read(), expected)) or HARMLESS

        sweep.damage("compressed", path, path, check, damages)


def sweep_commands(sweep: Sweep, exp: Path) -> None:
    """Damage the outputs of stages that are inputs of the commands in `EXPERIMENT_READERS`."""
    labels, corpus, out = exp / "iter1" / "label", exp / "prepare" / "manifest.arrow", exp / "exported"
    commands: dict[Path, Callable[[], object]] = {
        labels: lambda: export_experiment(str(labels), str(out), None),
        exp / "targets": lambda: list(training_sentences(exp, Tokenizer("phone"))),
        corpus: lambda: Manifest.verified(corpus),
        exp / "prepare" / DONE: lambda: stage_states(exp),
    }
    # There is no second experiment here, so a swap would change nothing.
    damages = [damage for damage in DAMAGES if damage is not swap]
    for source, command in commands.items():
        for path in files_of(source) if source.is_dir() else [source]:
            sweep.damage("inputs of commands", path, path, partial(error_of, command), damages)


def check_equal(content: Any, expected: Any) -> None:
    if content != expected:
        raise UserError("was read without an error, but its content differs")


def sweep_flac(sweep: Sweep, folder: Path) -> None:
    paths = [folder / f"{number}.flac" for number in range(2)]
    for number, path in enumerate(paths):
        write_flac(path, 0.1 * np.random.default_rng(number).standard_normal(16_000))
    damages = [damage for damage in DAMAGES if damage is not swap]  # any intact FLAC file is valid

    sweep.damage("FLAC", paths[0], paths[1], partial(error_of, partial(load_audio, paths[0])), damages)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5, help="number of trials per file and kind of damage")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        with contextlib.redirect_stdout(io.StringIO()):
            for name, seed in (("exp", 0), ("other", 1)):
                write_language_models(folder / name)
                for job in stage_jobs(folder / name, f"seed={seed}")[:-1]:  # all stages except the report
                    run_stage(*job)
        sweep = Sweep(args.trials)
        sweep_stages(sweep, folder / "exp", folder / "other")
        sweep_bundles(sweep, folder / "exp", folder / "other")
        sweep_unfinished(sweep, folder / "exp")
        sweep_language_models(sweep, folder / "exp")
        sweep_commands(sweep, folder / "exp")
        sweep_flac(sweep, folder)
    sweep.report()
    return 1 if sweep.missed else 0


if __name__ == "__main__":
    sys.exit(main())
