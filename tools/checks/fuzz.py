"""Fuzzing of the commands with damaged model files and text files, and with random settings.

    python tools/checks/fuzz.py                                   # 1,000 cases of each kind
    python tools/checks/fuzz.py --kinds models --cases 3000 --seed 1
    python tools/checks/fuzz.py --kinds texts --first 17 --cases 1 --keep case  # repeats one case

Every case runs a command in a forked process with a limit on time and memory. The kinds are: models (a
damaged file of a bundle, or of a fairseq or torchaudio checkpoint), texts (a damaged table, manifest, Kaldi
or fairseq file, lexicon, n-gram, text or dictionary) and settings (random settings and options). The command
must succeed or end with exit status 2 and a short message without a traceback, must write only to its own
folder, and must not print control characters. The script prints all other outcomes, and its exit status is 1
if there are any. A case depends only on its kind, the seed and its number. The script requires Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from fuzz_inputs import Writer, flat_keys, model_case, settings_case, text_case, write_texts
from small_experiment import overrides_of, run_stages, stage_jobs, write_model

from jahubert.cli.main import main as run_command
from jahubert.formats.convert import convert

KINDS = ("models", "texts", "settings")
CPU_SECONDS = 20  # a case that takes longer is considered hanging
MEMORY = 500 << 20  # bytes, in addition to those of the parent process
MAX_OUTPUT = 20_000  # characters of the output of a failed command


class Outcome(NamedTuple):
    """Result of a command in a forked process."""

    status: int
    output: str
    seconds: float  # CPU time
    memory: int  # peak memory in bytes


def run_forked(arguments: list[str], folder: Path, log: Path) -> Outcome:
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _run_child(arguments, folder, log)
    _, raw_status, usage = os.wait4(pid, 0)
    output = log.read_text(errors="backslashreplace")
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(raw_status), output, seconds, usage.ru_maxrss * 1024)


def _run_child(arguments: list[str], folder: Path, log: Path) -> None:
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(source, target)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.alarm(20 * CPU_SECONDS)
        status = run_command(arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:  # the child must not return, even if an error cannot be printed
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def is_argument(word: str) -> bool:
    """Return whether a shell can pass `word` as an argument."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:  # a surrogate that does not stand for a byte
        return False


def problem_of(outcome: Outcome, base_memory: int) -> str:
    """Return a description of the problem with an outcome, or an empty string."""
    if outcome.status not in (0, 2):
        return f"status {outcome.status}"
    if "Traceback" in outcome.output:
        return "traceback"
    if outcome.seconds > CPU_SECONDS:
        return f"{outcome.seconds:.0f} s of CPU time"
    if outcome.memory - base_memory > MEMORY:
        return f"{(outcome.memory - base_memory) >> 20} MiB"
    if outcome.status and not outcome.output.strip():
        return "no message"
    if outcome.status and len(outcome.output) > MAX_OUTPUT:
        return f"{len(outcome.output)} characters of output"
    if any(ord(char) < 32 and char not in "\n\t\r" for char in outcome.output):
        return "control characters in the output"
    return ""


def write_audio(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.wav" for number in range(6)]
    for number, path in enumerate(paths):
        soundfile.write(path, 0.1 * np.random.default_rng(number).standard_normal(8_000), 16_000)
    return paths


def write_models(exp: Path, folder: Path) -> list[Path]:
    """Write models in several formats, without checksums, so that damage is not detected at once."""
    folder.mkdir()
    write_model(exp, folder / "asr")
    shutil.copytree(exp / "iter2" / "label" / "bundle", folder / "units")
    shutil.copytree(exp / "iter1" / "pretrain" / "bundle", folder / "pretrained")
    for bundle in sorted(folder.iterdir()):
        info = json.loads((bundle / "jahubert.json").read_text(encoding="utf-8"))
        info.pop("files"), info.pop("checksum")
        (bundle / "jahubert.json").write_text(json.dumps(info), encoding="utf-8")
    for name, format in (("asr", "fairseq"), ("asr", "torchaudio"), ("pretrained", "fairseq")):
        convert(str(folder / name), str(folder / f"{name}-{format}.pt"), format)
    return sorted(folder.iterdir())


def writers(folder: Path) -> dict[str, Writer]:
    """Create valid input files, and return the function that writes a case, for each kind."""
    audio = write_audio(folder / "audio")
    run_stages(folder / "exp")
    models = write_models(folder / "exp", folder / "models")
    asr, units = str(folder / "models" / "asr"), str(folder / "models" / "units")
    texts = write_texts(folder / "texts", audio)
    for recipe, data in (("table", "table.csv"), ("fairseq", "fairseq")):  # for cases that run later stages
        exp = folder / "texts" / f"exp-{recipe}"
        run_command(
            ["run", f"recipe={recipe}", f"data={folder / 'texts' / data}", "stage=prepare", f"exp={exp}"]
        )
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_command(["run", "-c", "job", "recipe=demo", "stage=all"])
    import yaml

    tree = yaml.safe_load(output.getvalue())
    tree.pop("jobs", None)
    keys = sorted(flat_keys(tree))
    skipped = ("pretrain", "finetune")  # their settings include amounts of work, which may be large
    jobs = [job for job in stage_jobs(folder / "exp") if job.stage not in skipped]
    stages = [[word.replace(str(folder / "exp"), "EXP") for word in overrides_of(job)] for job in jobs]
    commands = [
        ["transcribe", str(audio[0]), "--device", "cpu", "--model", asr, "--beam", "5", "-f", "json"],
        ["features", str(audio[0]), "--device", "cpu", "--model", asr, "-o", "OUT", "--layer", "1,2"],
        ["units", str(audio[0]), "--device", "cpu", "--model", units, "--chunk", "8"],
        ["info", asr, "--json"],
        ["convert", asr, "OUT", "--to", "hf"],
        ["ngram", str(folder / "texts" / "text.txt"), "-o", "OUT.arpa", "--order", "2"],
        ["perplexity", str(folder / "texts" / "lm.arpa"), str(folder / "texts" / "text.txt")],
        ["status", str(folder / "exp"), "--json"],
        ["completion", "bash"],
    ]
    return {
        "models": model_case(models, audio[0]),
        "texts": text_case(folder / "texts", texts, folder / "models" / "asr"),
        "settings": settings_case(keys, stages, commands, folder / "exp"),
    }


def fuzz(kind: str, write: Writer, args: argparse.Namespace, folder: Path) -> int:
    """Run the cases of one kind, print the problems, and return their number."""
    case, log = args.keep.resolve() if args.keep else folder / "case", folder / "log"
    known = {*folder.iterdir(), case, log}
    base_memory = run_forked(["completion", "bash"], folder, log).memory
    counts, n_problems, started = Counter[str](), 0, time.monotonic()
    for number in range(args.first, args.first + args.cases):
        rng = random.Random(f"{kind} {args.seed} {number}")
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        arguments = write(case, rng)
        if not all(map(is_argument, arguments)):
            counts["not a possible command"] += 1
            continue
        outcome = run_forked(arguments, case, log)
        problem = problem_of(outcome, base_memory)
        if new := {*folder.iterdir()} - known:
            problem = f"wrote to {', '.join(map(str, new))}"
            known |= new
        counts[problem.partition(" ")[0] if problem else f"status {outcome.status}"] += 1
        if problem:
            n_problems += 1
            shown = [word if len(word) < 200 else word[:200] + "..." for word in arguments]
            output = outcome.output if len(outcome.output) < 3000 else outcome.output[-3000:]
            print(f"{kind}, seed {args.seed}, case {number}: {problem}\n{shown!r}\n{output}", flush=True)
    results = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    print(f"{kind}, seed {args.seed}: {args.cases} cases in {time.monotonic() - started:.0f} s; {results}")
    sys.stdout.flush()
    return n_problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, help="folder for the files of the last case, which are kept")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # forked processes would wait for the threads of their parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        made = writers(folder)
        n_problems = sum(fuzz(kind, made[kind], args, folder) for kind in args.kinds)
    return 1 if n_problems else 0


if __name__ == "__main__":
    sys.exit(main())
