"""What a folder was made from: keep it, continue it, or refuse to mix it with something else.

A stage's fingerprint covers its name, its VERSION, the settings that change its result and the
fingerprints of its inputs. `started.json` is written before the work, `provenance.json` after it, by
rename. The same and finished: kept. The same and not finished: continued. Another: refused, with the setting
that differs. A setting that a record does not have, because an earlier version did not know it or wrote down
only what was typed, counts as left at its default.
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

from jahubert.errors import DataError, StaleError
from jahubert.formats.atomic import PREFIX, atomic_write
from jahubert.train.experiment import checksums
from jahubert.train.experiment.config import input_fields, result_fields
from jahubert.train.experiment.lock import LOCK_NAME as RUNNING
from jahubert.train.experiment.lock import lock_owner
from jahubert.train.experiment.registry import DECODED, stage_of

STARTED, DONE = "started.json", "provenance.json"


def stage_inputs(stage: str, version: int, config: Any) -> dict[str, Any]:
    """Everything the result depends on, as JSON-ready values: what `fingerprint` hashes."""
    models = {name for name, _, model in input_fields(config) if model}
    fields = {}
    for name, value in result_fields(config).items():
        is_input = isinstance(value, Path)
        fields[name] = input_fingerprint(f"{stage}.{name}", value, name in models) if is_input else value
    return {"stage": stage, "version": version, "settings": fields}


def fingerprint(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def acquire(out: Path, recipe: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> bool:
    """Claim the folder `out` for this recipe; True when its result is already there.

    `defaults`: of the settings, for those that the record in the folder does not have (`default_fields`).

    Raises:
        StaleError: the folder was made, or started, with something else.
    """
    for name in (DONE, STARTED):
        if (out / name).exists():
            before = read_record(out / name)
            _refuse_other(out, before, recipe, defaults or {}, finished=name == DONE)
            return name == DONE
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STARTED, {"fingerprint": fingerprint(recipe), **recipe})
    return False


def rollback(out: Path, seconds: float) -> None:
    """Take the claim back where nothing was made under it: a mistake may be mended in the settings.

    `seconds`: of work so far, which are kept with a claim that stays.
    """
    nothing = (STARTED, RUNNING, "rejected.jsonl")
    curve_or_unfinished = ("events.out.tfevents", PREFIX)  # a curve is drawn of metrics.jsonl, or is empty
    made = any(
        path.is_file()
        and path.name not in nothing
        and not any(part.startswith(curve_or_unfinished) for part in path.relative_to(out).parts)
        for path in out.rglob("*")
    )
    if not made:
        (out / STARTED).unlink(missing_ok=True)
    elif (out / STARTED).exists():
        with suppress(OSError):  # a full disk is what may have ended it
            write_json(out / STARTED, read_record(out / STARTED) | {"seconds": round(seconds, 1)})


def elapsed_seconds(out: Path) -> float:
    """Seconds of work in runs of this stage that ended before it was done (but not by a kill)."""
    return read_record(out / STARTED).get("seconds", 0.0) if (out / STARTED).exists() else 0.0


def finish(out: Path, recipe: dict[str, Any], metrics: dict[str, Any], seconds: float) -> None:
    """Write the record that makes the folder done. The last thing a stage does."""
    from jahubert.train.experiment.environment import environment

    record = {
        "fingerprint": fingerprint(recipe),
        **recipe,
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "outputs": checksums.describe_outputs(out),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_with": environment(),
    }
    write_json(out / DONE, record | {"record_crc32": checksums.content_crc32(record)})


def verify_inputs(config: Any, large: bool = True) -> None:
    """Compare the files that a stage reads with the sizes and checksums in the records of their stages.

    Args:
        config: of the stage that reads them.
        large: also read files of more than a gigabyte; otherwise only their sizes are compared.

    Raises:
        DataError: a file or a record is missing or damaged; names it.
    """
    for _, path, _ in input_fields(config):
        stages = [folder for folder in (path, *path.parents[:2]) if (folder / DONE).exists()][:1]
        if not stages and (path / "prepare").is_dir():  # an experiment
            stages = sorted(record.parent for record in path.rglob(DONE))
        for folder in stages:
            record = read_record(folder / DONE)
            crc32 = record.pop("record_crc32", None)
            if crc32 is not None and crc32 != checksums.content_crc32(record):
                raise DataError(f"{folder / DONE}: damaged record; delete {folder} and rerun its stage")
            below = path if folder in path.parents else None
            max_bytes = math.inf if large else checksums.LARGE
            checksums.verify_outputs(folder, record.get("outputs", {}), below, max_bytes)


def read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not readable ({error}); delete the folder {path.parent} to make it again"
        ) from error


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def input_fingerprint(name: str, path: Path, model: bool = False) -> str:
    """An input made by a stage counts by its record, a foreign file or folder by its name and size.

    Args:
        name: the setting that names the path.
        model: it may be a name on the Hub.

    Raises:
        DataError: it is not there, or not finished.
    """
    for folder in (path, path.parent):  # a stage names another stage's folder, or one thing in it
        if (folder / DONE).exists():
            record = read_record(folder / DONE)
            content = record.get("metrics", {}).get("content")  # of a stage whose settings do not say it all
            return fingerprint({record["fingerprint"]: content}) if content else record["fingerprint"]
        if (folder / STARTED).exists():
            raise DataError(
                f"{name}: {folder} is not finished; run that stage first (jahubert status shows which)"
            )
    if path.is_file():
        return f"{path.name}:{path.stat().st_size}"
    if path.is_dir() and (path / "config.json").exists():  # a model folder from elsewhere
        weights = sorted(path.glob("*.safetensors"))
        return ",".join([path.name, *(f"{file.name}:{file.stat().st_size}" for file in weights)])
    if path.is_dir():
        return str(path)
    if model and len(path.parts) == 2 and not path.is_absolute():
        return str(path)  # a Hub name
    if stage := stage_of(path):
        raise DataError(
            f"{name}: there is no {path}; run stage={stage} first, which makes it, or correct {name} "
            "(jahubert status shows what is done)"
        )
    other = (
        "give a folder, a model file or a Hub name (owner/model)" if model else "set it to one that is there"
    )
    raise DataError(f"{name}: there is no {path}; {other}")


def changed_settings(
    stage: str, before: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """A sentence on each setting that is another one than in a record."""
    new, default = (json.loads(json.dumps(dict(side), default=str)) for side in (settings, defaults))
    old: dict[str, Any] = {}
    for key, value in before.get("settings", {}).items():
        if isinstance(value, dict) and key not in new:  # a group as it was typed
            old |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            old[key] = value
    said = []
    for key in sorted(old.keys() | new.keys()):
        was, now = (side.get(key, default.get(key)) for side in (old, new))
        if was != now:
            said.append(f"{stage}.{key} was {_short(was)}, now {_short(now)}")
    return said


def _refuse_other(
    out: Path, before: dict[str, Any], recipe: dict[str, Any], defaults: Mapping[str, Any], finished: bool
) -> None:
    stage, version = recipe["stage"], recipe["version"]
    said = changed_settings(stage, before, recipe["settings"], defaults)
    if before.get("version") != version:
        said.append(f"{stage} itself changed, from version {before.get('version')} to {version}")
    if not said:
        return
    state = "was made" if finished else "was started"
    beside = (
        "decoding=NAME for a second decoding of the same model" if stage in DECODED else "another name=..."
    )
    raise StaleError(
        f"{out} {state} with other settings:\n  " + "\n  ".join(said) + f"\nUse the old settings, {beside}, "
        "or delete the folder to make it again."
    )


def _short(value: Any) -> str:
    text = str(value)
    return f"another input ({text[:8]})" if len(text) == 64 and " " not in text else text


def stage_states(root: Path) -> list[dict[str, Any]]:
    """What is done in an experiment's folder, a stage each, in the order in which they were started.

    Raises:
        DataError: no stage has written into `root`.
    """
    states = []
    for started in sorted(root.glob("**/" + STARTED), key=lambda path: path.stat().st_mtime):
        folder = started.parent
        done = (folder / DONE).exists()
        record = read_record(folder / DONE if done else started)
        state = {"stage": str(folder.relative_to(root)), "state": "done" if done else "started"}
        if not done:
            state |= _progress(folder, record)
        kept = ("seconds", "finished", "metrics", "fingerprint")
        states.append(state | {key: record[key] for key in kept if key in record})
    if not states:
        raise DataError(f"{root}: no stage has run here; give the folder of an experiment, such as exp/demo")
    return states


def _progress(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """How far a stage is, and who is at it."""
    running, last = lock_owner(folder), _last_line(folder / "metrics.jsonl")
    at_it = f"running: {running}" if running else "stopped: the same command continues"
    found: dict[str, Any] = {"state": "running" if running else "stopped", "at": at_it}
    if last and (of := record.get("settings", {}).get("train.max_steps")):
        found |= {"state": f"{100 * last['step'] // of} %", "last": last}
    return found


def _last_line(path: Path) -> dict[str, Any]:
    """The last metrics of training that were written down; none of validation."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            written = [line for line in file.read().splitlines() if line[:1] == b"{" and line[-1:] == b"}"]
        lines = map(json.loads, reversed(written))
        return next((line for line in lines if "lr" in line), {})
    except (OSError, ValueError):
        return {}


def _is_short(value: object) -> bool:
    """A number or a word, and no fingerprint."""
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 20)


def status_table(states: list[dict[str, Any]]) -> str:
    """`stage_states` as a table, one line a stage."""
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
