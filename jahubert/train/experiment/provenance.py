"""Provenance records of output folders, with fingerprints of their settings and inputs.

The fingerprint of a stage covers its name, its VERSION, the settings that change its result, and the
fingerprints of its inputs. `started.json` is written atomically before the stage runs, and `provenance.json`
after it has finished. When a stage runs again with the same settings, a finished folder is kept and an
unfinished one is resumed. If its settings, inputs or VERSION differ, a StaleError lists the differences. A
setting that is missing from a record, because it was added to the package later, is assumed to have its
default value.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jahubert.errors import DataError, StaleError, quote
from jahubert.formats.atomic import PREFIX, atomic_write
from jahubert.formats.lock import LOCK_NAME as RUNNING
from jahubert.formats.lock import lock_owner
from jahubert.formats.model_files import model_files
from jahubert.train.experiment import checksums
from jahubert.train.experiment.config import input_fields, result_fields
from jahubert.train.experiment.registry import PER_DECODING, source_file, stage_of

STARTED, DONE = "started.json", "provenance.json"
_RECORD_FIELDS: dict[str, Any] = {
    "fingerprint": str,
    "settings": dict,
    "metrics": dict,
    "outputs": dict,
    "seconds": (int, float),
}


def stage_inputs(stage: str, version: int, config: Any) -> dict[str, Any]:
    """Return everything on which the result of a stage depends, as JSON-compatible values."""
    models = {name for name, _, model in input_fields(config) if model}
    fields = {}
    for name, value in result_fields(config).items():
        if isinstance(value, Path):
            fields[name] = input_fingerprint(f"{stage}.{name}", value, name in models)
        elif (file := source_file(value)) is not None:
            fields[name] = f"{value},{_file_fingerprint(file)}"
        else:
            fields[name] = value
    return {"stage": stage, "version": version, "settings": fields}


def fingerprint(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def acquire(out: Path, inputs: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> bool:
    """Record that a stage starts in the folder `out`, unless it was started or finished there before.

    Args:
        inputs: the result of `stage_inputs`.
        defaults: values of settings that are missing from the folder's record (`default_fields`).

    Returns:
        Whether the folder has the complete result of the stage.

    Raises:
        StaleError: the stage was run in the folder with different settings or by another version of its code.
        DataError: the record in the folder is unreadable.
    """
    for name in (DONE, STARTED):
        if (out / name).exists():
            before = read_record(out / name)
            changes = changed_settings(inputs["stage"], before, inputs["settings"], defaults or {})
            _check_unchanged(out, before, inputs, changes, finished=name == DONE)
            return name == DONE
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STARTED, {"fingerprint": fingerprint(inputs), **inputs})
    return False


def rollback(out: Path, seconds: float) -> None:
    """Undo `acquire` if the stage has produced no output, so that its settings can be changed.

    Args:
        seconds: duration of the stage so far, which is recorded if there is output.
    """
    if not any(_is_output(path, out) for path in out.rglob("*")):
        (out / STARTED).unlink(missing_ok=True)
    elif (out / STARTED).exists():
        with suppress(OSError):  # the stage may have failed because the disk is full
            write_json(out / STARTED, read_record(out / STARTED) | {"seconds": round(seconds, 1)})


def _is_output(path: Path, out: Path) -> bool:
    """Return whether `path` is an output file from which a failed stage can be resumed."""
    if not path.is_file() or path.name in (STARTED, RUNNING, "rejected.jsonl"):
        return False
    # Tracker files repeat the content of metrics.jsonl; PREFIX marks temporary files.
    ignored = ("events.out.tfevents", "wandb", PREFIX)
    return not any(part.startswith(ignored) for part in path.relative_to(out).parts)


def elapsed_seconds(out: Path) -> float:
    """Return the duration of earlier, unfinished runs of a stage, as recorded by `rollback`."""
    return read_record(out / STARTED).get("seconds", 0.0) if (out / STARTED).exists() else 0.0


def finish(out: Path, inputs: dict[str, Any], metrics: dict[str, Any], seconds: float) -> None:
    """Write the record that marks a stage folder as finished. This must be the last write to the folder."""
    from jahubert.train.experiment.environment import environment

    record = {
        "fingerprint": fingerprint(inputs),
        **inputs,
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "outputs": checksums.describe_outputs(out),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_with": environment(),
    }
    write_json(out / DONE, record | {"record_crc32": checksums.content_crc32(record)})


def verify_inputs(config: Any, large: bool = True) -> None:
    """Verify the sizes and checksums of a stage's input files against the records of earlier stages.

    Args:
        config: config of the stage that reads the files.
        large: also verify the checksums of files over 1 GiB; otherwise only their sizes.

    Raises:
        DataError: a file is missing or damaged, or a record is damaged.
    """
    for _, path, _ in input_fields(config):
        verify_files(path, large)


def verify_files(path: Path, large: bool = True) -> None:
    """Verify a file or folder against the record of the stage that wrote it, if there is one.

    Args:
        path: a file of a stage, the folder of a stage, or the folder of an experiment.
        large: also verify the checksums of files over 1 GiB; otherwise only their sizes.

    Raises:
        DataError: a file is missing or damaged, or a record is damaged.
    """
    stages = [folder for folder in (path, *path.parents[:2]) if (folder / DONE).exists()][:1]
    if not stages and (path / "prepare").is_dir():  # `path` is the folder of an experiment
        stages = sorted(record.parent for record in path.rglob(DONE))
    for folder in stages:
        record = read_finished(folder)
        below = path if folder in path.parents else None
        max_bytes = math.inf if large else checksums.LARGE
        checksums.verify_outputs(folder, record["outputs"], below, max_bytes)


def read_finished(folder: Path) -> dict[str, Any]:
    """Read the record of a finished stage, and verify its checksum.

    Raises:
        DataError: the record is missing or damaged.
    """
    record = read_record(folder / DONE)
    if record.pop("record_crc32", None) != checksums.content_crc32(record):
        raise DataError(f"{folder / DONE}: damaged record; delete {folder} and rerun its stage")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object that a stage wrote, and check the types of the fields of `DONE` and `STARTED`.

    Raises:
        DataError: the file is unreadable, is not a JSON object, or has a field of a wrong type.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"found {quote(record)} instead of an object")
        if path.name in (STARTED, DONE):
            for name, kind in _RECORD_FIELDS.items():
                if (name in record or name == "fingerprint") and not isinstance(record.get(name), kind):
                    raise ValueError(f"{name} is {quote(record.get(name))}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable ({error}); delete {path.parent} and rerun its stage") from error
    return record


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name or setting is not UTF-8
        text = json.dumps(content, indent=2, default=str)
    with atomic_write(path) as file:
        file.write(text + "\n")


def input_fingerprint(name: str, path: Path, model: bool = False) -> str:
    """Compute the fingerprint of an input.

    The fingerprint is taken from the record of the stage that wrote the input. Files and models that no stage
    wrote are identified by names, sizes and checksums, models on the Hub by their names, and other folders by
    their paths.

    Args:
        name: name of the setting, for error messages.
        model: whether the path may be the name of a model on the Hub.

    Raises:
        DataError: the input does not exist, or the stage that writes it is not finished or has an unreadable
            record.
    """
    for folder in (path, path.parent):  # `path` is the folder of a stage, or a file or folder inside it
        if (folder / DONE).exists():
            record = read_record(folder / DONE)
            # Stages whose result is not determined by their settings record a hash of the content.
            content = record.get("metrics", {}).get("content")
            return fingerprint({record["fingerprint"]: content}) if content else record["fingerprint"]
        if (folder / STARTED).exists():
            raise DataError(f"{name}: {folder} is not finished; finish its stage first (see jahubert status)")
    if files := model_files(path):  # a file or model folder that no stage wrote
        name_of_folder = [path.name] if path.is_dir() else []
        return ",".join([*name_of_folder, *map(_file_fingerprint, files)])
    if path.is_dir():
        return str(path)
    if model and len(path.parts) == 2 and not path.is_absolute():
        return str(path)  # a Hub name
    if stage := stage_of(path):
        raise DataError(
            f"{name}: {path} not found; run stage={stage} first, or correct {name} (see jahubert status)"
        )
    expected = "a folder, a model file or a Hub name (owner/model)" if model else "an existing file or folder"
    raise DataError(f"{name}: {path} not found; set {name} to {expected}")


def _file_fingerprint(path: Path) -> str:
    return f"{path.name}:{path.stat().st_size}:{checksums.file_crc32(path)}"


def changed_settings(
    stage: str, before: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Return one message per setting that differs from a record.

    `defaults` is described in `acquire`.
    """
    old = before.get("settings", {})
    new, default = (json.loads(json.dumps(dict(side), default=str)) for side in (settings, defaults))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, default.get(key)), new.get(key, default.get(key))
        if was != now:
            changes.append(f"{stage}.{key} was {_short(was)}, now {_short(now)}")
    return changes


def _check_unchanged(
    out: Path,
    before: dict[str, Any],
    inputs: dict[str, Any],
    changes: list[str],
    finished: bool,
) -> None:
    """Raise StaleError if settings or the version of the stage differ from those in the record."""
    stage, version = inputs["stage"], inputs["version"]
    difference, remedy = "with different settings", "Restore those settings, use"
    if not changes:
        difference, remedy = "by another version of the stage", "Use"
    if before.get("version") != version:
        changes = [*changes, f"{stage} changed from version {before.get('version')} to {version}"]
    if not changes:
        return
    state = "was created" if finished else "was started"
    alternative = (
        "decoding=NAME for another decoding of the same model"
        if stage in PER_DECODING
        else "a different name=..."
    )
    raise StaleError(
        f"{out} {state} {difference}:\n  "
        + "\n  ".join(changes)
        + f"\n{remedy} {alternative}, or delete the folder and rerun the stage."
    )


def _short(value: Any) -> str:
    text = str(value)
    return f"input {text[:8]}" if len(text) == 64 and " " not in text else text


def stage_states(root: Path) -> list[dict[str, Any]]:
    """Return the state of each stage in an experiment, ordered by the modification time of `started.json`.

    Raises:
        DataError: `root` contains no stage output, or a record is unreadable or damaged.
    """
    states = []
    for started in sorted(root.glob("**/" + STARTED), key=lambda path: path.stat().st_mtime):
        folder = started.parent
        done = (folder / DONE).exists()
        record = read_finished(folder) if done else read_record(started)
        state = {"stage": str(folder.relative_to(root)), "state": "done" if done else "started"}
        if not done:
            state |= _progress(folder, record)
        kept = ("seconds", "finished", "metrics", "fingerprint")
        states.append(state | {key: record[key] for key in kept if key in record})
    if not states:
        raise DataError(f"{root}: no stage output found; use the folder of an experiment, e.g. exp/demo")
    return states


def _progress(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the progress of an unfinished stage, and the process that is running it, if any."""
    owner = lock_owner(folder)
    last = _last_training_metrics(folder / "metrics.jsonl")
    step, max_steps = last.get("step"), record.get("settings", {}).get("train.max_steps")
    activity = f"running: {owner}" if owner else "stopped: rerun the same command to resume"
    progress: dict[str, Any] = {"state": "running" if owner else "stopped", "at": activity}
    if isinstance(step, int) and isinstance(max_steps, int) and max_steps > 0:
        progress |= {"state": f"{100 * step // max_steps} %", "last": last}
    return progress


def _last_training_metrics(path: Path) -> dict[str, Any]:
    """Return the last logged training metrics, skipping validation metrics."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            complete = [line for line in file.read().splitlines() if line[:1] == b"{" and line[-1:] == b"}"]
        lines = map(json.loads, reversed(complete))
        return next((line for line in lines if "lr" in line), {})
    except (OSError, ValueError, RecursionError):
        return {}


def _is_short(value: object) -> bool:
    """Return whether a value is a number or a short text that is not a fingerprint."""
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 20)


def status_table(states: list[dict[str, Any]]) -> str:
    """Format the result of `stage_states` as a table with one line per stage."""
    rows = [("stage", "state", "time", "result")]
    for state in states:
        metrics = {k: v for k, v in state.get("metrics", state.get("last", {})).items() if _is_short(v)}
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()][:4]
        time = f"{state['seconds']:.0f} s" if "seconds" in state else ""
        rows.append((state["stage"], state["state"], time, "  ".join([*shown, state.get("at", "")])))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    )
