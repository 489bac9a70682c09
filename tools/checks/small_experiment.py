"""Tiny experiment for the checks in this folder, with all stages and commands.

The experiment consists of five recordings of one second and a model of width 16, so each stage takes a
fraction of a second. Stages and commands run in forked children of one process that has imported all modules,
so a trial takes little more time than the stage or command itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jahubert.cli import main as cli
from jahubert.formats.bundle import CALIBRATION_KEY, LanguageModel, load_bundle, save_bundle
from jahubert.inference.confidence import Calibration, WordFeatures
from jahubert.lm.arpa import write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.train.experiment.registry import Job
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.pipeline.reporting import report_error
from jahubert.train.pipeline.runner import run_stage

REPO = Path(__file__).resolve().parents[2]
SETTINGS = [
    f"recipe={REPO / 'tests' / 'fixtures' / 'rough'}", "prepare.options.recordings=4", "iterations=1",
    "workers=0", "device=cpu", "pretrain.train.max_steps=4", "pretrain.train.save_every=2",
    "pretrain.train.valid_every=2", "finetune.train.max_steps=4", "finetune.train.save_every=2",
    "finetune.train.valid_every=2",
]  # fmt: skip
NGRAM = "ngram"  # name of the decoding that uses a lexicon, a tuned n-gram and calibrated confidences
TIMEOUT_SECONDS = 600  # a stage or command that takes longer is considered hanging, even on a busy machine
# Fields in JSON files that may differ between runs with equal results: times, the environment,
# and checksums of files with such fields.
_VARYING = {
    "seconds",
    "finished",
    "timing",
    "window",
    "outputs",
    "record_crc32",
    "crc32",
    "files",
    "made_with",
}


class Task(NamedTuple):
    """A stage or command.

    Attributes:
        out: output folder, which does not exist before the first run.
        work: function that runs the task; returns an exit status or None, and may raise an exception.
        refuses_existing: whether it is an error to run the task again if the output is complete.
    """

    name: str
    out: Path
    work: Callable[[], Any]
    refuses_existing: bool = False


def stage_jobs(exp: Path, *overrides: str) -> list[Job]:
    """Return the stages of the experiment in folder `exp` in order; the last one is the report."""
    common = [*SETTINGS, f"exp={exp}", *overrides]
    *jobs, report = configure_jobs([*common, "stage=all"])
    for stage in ("decode", "score"):
        jobs += configure_jobs([*common, *ngram_overrides(exp), f"stage={stage}"])
    return [*jobs, report]


def ngram_overrides(exp: Path) -> list[str]:
    """Return the overrides of the decoding with an n-gram, whose files `write_language_models` writes."""
    return [
        f"decoding={NGRAM}",
        f"decode.lm={exp / 'words.arpa.gz'}",
        f"decode.lexicon={exp / 'words.txt'}",
        "decode.splits=[dev,test]",
        "decode.tune_splits=[dev]",
        "decode.tune_word_bonuses=[20]",  # with 20, the untrained model outputs words
        "score.calibration_splits=[dev]",
    ]


def overrides_of(job: Job) -> list[str]:
    """Return the overrides with which `jahubert run` runs one stage of the experiment."""
    exp = next(folder.parent for folder in (job.out, *job.out.parents) if folder.parent.name == "exp")
    iteration = job.out.parent.name.removeprefix("iter")
    return [
        *SETTINGS,
        f"exp={exp}",
        f"stage={job.stage}",
        *([f"iteration={iteration}"] if iteration.isdigit() else []),
        *(ngram_overrides(exp) if job.out.name.endswith(f"-{NGRAM}") else []),
    ]


def write_language_models(exp: Path) -> None:
    """Write a lexicon and n-grams over words and over phones to the folder of the experiment."""
    exp.mkdir(parents=True, exist_ok=True)
    (exp / "words.txt").write_text("愛\ta i\n青\ta o\n家\ti e\n", encoding="utf-8")
    for name, words in (("words", ["愛", "青", "家"]), ("phones", ["a", "i", "o", "e", "|"])):
        write_arpa(train_ngram([[word] for word in words] + [words], 2), exp / f"{name}.arpa.gz")


def write_model(exp: Path, folder: Path) -> None:
    """Write the recognizer of a finished experiment with an n-gram and calibrated confidences."""
    bundle = load_bundle(exp / "systems" / "main" / "finetune")
    save_bundle(
        folder,
        ctc=bundle.ctc,
        phonemes=bundle.phonemes,
        info={CALIBRATION_KEY: Calibration(1.0, WordFeatures(2.0, 0.5, 1.0, 0.1)).to_json()},
        language_model=LanguageModel(exp / "phones.arpa.gz", 0.5, 20.0),
    )


def stage_tasks(exp: Path) -> list[Task]:
    """Return the stages of the experiment as tasks."""
    write_language_models(exp)
    return [
        Task(str(job.out.relative_to(exp)), job.out, lambda job=job: _finish_stage(job))  # type: ignore[misc]
        for job in stage_jobs(exp)
    ]


def run_stages(exp: Path) -> None:
    """Run all stages of the experiment without output, which also imports all modules before a fork."""
    with contextlib.redirect_stdout(io.StringIO()):
        for task in stage_tasks(exp):
            task.work()


def _finish_stage(job: Job) -> None:
    run_stage(*job)


def command_tasks(exp: Path, out: Path) -> list[Task]:
    """Return tasks for commands that read a finished experiment. Each task has its own output folder."""
    out.mkdir(exist_ok=True)
    write_model(exp, out / "model")
    audio = recordings(exp)
    (out / "texts.txt").write_text("青い家\n家の愛\n", encoding="utf-8")
    (out / "table.csv").write_text(
        "path,text\n" + "".join(f"{path},青い家\n" for path in audio), encoding="utf-8"
    )
    tasks = []
    for name, arguments in commands(exp, out).items():
        folder = out / name.replace(" ", "-")
        arguments = [word.replace("OUT", str(folder)) for word in arguments]
        refuses_existing = arguments[0] == "convert" or name == "features safetensors"
        tasks.append(Task(name, folder, lambda a=arguments: cli.main(a), refuses_existing))  # type: ignore[misc]
    return tasks


def recordings(exp: Path) -> list[str]:
    return [str(exp / "prepare" / "work" / f"{number}.wav") for number in range(2)]


def commands(exp: Path, out: Path) -> dict[str, list[str]]:
    """Return a command line for each command, format and kind of input. OUT stands for an output folder."""
    audio = recordings(exp)
    asr, units = exp / "systems" / "main" / "finetune" / "bundle", exp / "iter2" / "label" / "bundle"
    pretrained, corpus, ngram = exp / "iter1" / "pretrain" / "bundle", exp / "prepare", out / "model"
    texts, table = out / "texts.txt", out / "table.csv"
    unchanged = ["--no-vad", "--no-conditioning"]
    transcribe = ["transcribe", *audio, *unchanged, "-f", "all", "-o", "OUT"]
    words = ["--lexicon", exp / "words.txt", "--lm", exp / "words.arpa.gz", "--word-bonus", "20"]
    lines: dict[str, list[object]] = {
        "features folder": ["features", *audio, "--model", asr, "-o", "OUT"],
        "features safetensors": ["features", *audio, "--model", asr, "-o", "OUT/all.safetensors"],
        "features chunked": ["features", *audio, "--model", asr, "--chunk", "8", "-o", "OUT"],
        "units folder": ["units", *audio, "--model", units, "-o", "OUT"],
        "transcribe all formats": [*transcribe, "--model", asr],
        "transcribe file": ["transcribe", audio[0], "--model", asr, "-o", "OUT/0.srt", *unchanged],
        "transcribe n-gram": [*transcribe, "--model", ngram],
        "transcribe lexicon": [*transcribe, "--model", asr, *words],
        "ngram": ["ngram", texts, "-o", "OUT/words.arpa.gz", "--lexicon", "OUT/words.txt"],
        "ngram experiment": ["ngram", exp, "--unit", "phone", "-o", "OUT/phones.arpa"],
        "convert hf": ["convert", ngram, "OUT/model", "--to", "hf"],
        "convert fairseq": ["convert", pretrained, "OUT/model.pt", "--to", "fairseq"],
        "convert torchaudio": ["convert", asr, "OUT/model.pt", "--to", "torchaudio"],
        "convert onnx": ["convert", asr, "OUT/model.onnx", "--to", "onnx"],
        "convert units": ["convert", exp / "iter1" / "label", "OUT/labels", "--to", "fairseq"],
        "convert kaldi": ["convert", corpus, "OUT/kaldi", "--to", "kaldi"],
        "convert lhotse": ["convert", corpus, "OUT/lhotse", "--to", "lhotse"],
        "convert datasets": ["convert", corpus, "OUT/datasets", "--to", "datasets"],
        "prepare table": ["run", "recipe=table", f"data={table}", "stage=prepare", "exp=OUT"],
        "info": ["info", ngram],
        "perplexity": ["perplexity", exp / "words.arpa.gz", texts],
        "plan": ["plan", *SETTINGS, f"exp={exp}", "stage=all"],
        "status": ["status", exp],
        "completion": ["completion", "bash"],
    }
    return {name: [str(word) for word in words] for name, words in lines.items()}


def run_child(work: Callable[[], Any], log: Path) -> int:
    """Run `work` in a forked child that writes its output to `log`, and return the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable(all_threads=False)
        signal.alarm(TIMEOUT_SECONDS)
        try:
            status = work() or 0
        except BaseException as error:
            status = report_error(error)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of the files in a folder, keyed by relative path, without varying JSON fields.

    TensorBoard events are omitted. For report pages, DCP metadata and gzip files, only their presence is
    recorded, because their content depends on times or on the order of a pickled dictionary.
    """
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.startswith("tensorboard/"):
            continue
        data: Any = path.read_bytes()
        if path.suffix == ".json":
            data = _without_varying(json.loads(data))
        elif path.suffix == ".jsonl":
            data = [_without_varying(json.loads(line)) for line in data.splitlines()]
        elif path.name in ("report.html", ".metadata") or path.name.endswith(".gz"):
            data = None
        files[name] = data
    return files


def _without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_varying(inner) for key, inner in value.items() if key not in _VARYING}
    return [_without_varying(inner) for inner in value] if isinstance(value, list) else value
