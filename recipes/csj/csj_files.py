"""File layouts of the CSJ editions, and assignment of talks to splits.

USB (3rd and 4th edition)  MORPH/SDB/{core,noncore}/ID.sdb  WAV/{core,noncore}/ID.wav, ID-L.wav, ID-R.wav
                           XML/BaseXML/{core,noncore}/ID.xml  TRN/Form1/{core,noncore}/ID.trn  fileList.csv
DVD                        dvd3 ... dvd17/ID/ID.{sdb,wav,xml,trn}
merl (Kaldi's name)        CSJ2004/{SDB,WAV,XML,TRN}/ID.*  or  CSJ2004/SPEECH/ID/ID.*
"""

from __future__ import annotations

import csv
import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from jahubert.errors import DataError
from jahubert.train.data.manifest import Rejected
from jahubert.train.data.utterances import (
    is_file,
    is_folder,
    read_bytes,
    read_reliably,
    read_text,
    same_content,
)
from jahubert.train.experiment.config import expand_user

log = logging.getLogger(__name__)

LISTS = Path(__file__).parent / "lists"
EVALS = ("eval1", "eval2", "eval3")
DIFFERENT_COPIES = "different copies"  # reason for rejection
TALK_ID = r"[A-Z]\d\d[FM]\d{4}"
_PART = r"(?P<part>core|noncore)"
_FILE = rf"(?P<talk>{TALK_ID})(-(?P<channel>[LR])(?=\.wav))?\.(?P<kind>sdb|xml|trn|wav)"
_LAYOUTS = (
    ("MORPH", "SDB", _PART, _FILE),
    ("XML", "BaseXML", _PART, _FILE),
    ("TRN", "Form1", _PART, _FILE),
    ("WAV", _PART, _FILE),
    (r"dvd\d+", TALK_ID, _FILE),
    ("(CSJ2004)?", "SDB|WAV|XML|TRN", _FILE),
    ("(CSJ2004)?", "SPEECH", TALK_ID, _FILE),
)
TALKS = 3302  # number of talks in the whole corpus according to NINJAL
# Values in fileList.csv that mark a core talk. Public readers expect コア for core talks and ノンコア for
# others.
_CORE = ("コア", "core", "○", "◯", "〇", "1")
_NOT_CORE = ("", "ノンコア", "非コア", "noncore", "non-core", "×", "-", "0")


@dataclass
class Talk:
    """The files of a talk."""

    id: str
    audio: dict[str, Path] = field(default_factory=dict)  # channel ("" if the name has none) -> path
    transcripts: dict[str, Path] = field(default_factory=dict)  # kind (sdb, xml or trn) -> path
    core: bool = False
    # Pairs of a file in `audio` or `transcripts` and a file with the same name in another folder.
    copies: list[tuple[Path, Path]] = field(default_factory=list)


def find_talks(data: Path) -> dict[str, Talk]:
    """Find all talks in the folder `data`, which may have any of the layouts above. Keys are talk ids.

    Raises:
        DataError: no talks were found, or a folder or fileList.csv cannot be read.
    """
    talks: dict[str, Talk] = {}
    parts: dict[str, set[str]] = {}
    for path, groups in _matches(data):
        talk = talks.setdefault(groups["talk"].upper(), Talk(groups["talk"].upper()))
        if part := (groups.get("part") or "").lower():
            parts.setdefault(talk.id, set()).add(part)
        kind = groups["kind"].lower()
        if kind == "wav":
            files, key = talk.audio, (groups["channel"] or "").upper()
        else:
            files, key = talk.transcripts, kind
        if (first := files.setdefault(key, path)) != path:
            talk.copies.append((first, path))
    if not talks:
        raise DataError(
            f"{data}: no CSJ talks found; set data= to a folder with WAV and MORPH/SDB (USB), dvd3 ... dvd17 "
            "(DVD), or CSJ2004 with SDB and WAV"
        )
    listed = _read_file_list(data)
    if ambiguous := sorted(id for id, names in parts.items() if len(names) > 1):
        log.warning(
            "csj: talks both in a folder core and in a folder noncore, for which fileList.csv or "
            "lists/core.txt is used (%d): %s",
            len(ambiguous),
            abbreviated(ambiguous),
        )
    _mark_core(talks, {id: min(names) for id, names in parts.items() if len(names) == 1}, listed)
    if missing := sorted(listed.keys() - talks.keys()):
        log.warning("csj: talks in fileList.csv not found (%d): %s", len(missing), abbreviated(missing))
    return dict(sorted(talks.items()))


def compare_copies(talk: Talk) -> Iterator[Rejected]:
    """Yield the unused copies of the files of a talk, and the talk itself if a copy has different content."""
    for used, other in talk.copies:
        if same_content(used, other):
            yield Rejected(str(other), "duplicate file", f"same content as {used}")
        else:
            detail = f"{used} and {other} have different content; remove one of them"
            yield Rejected(talk.id, DIFFERENT_COPIES, detail)


def _mark_core(talks: Mapping[str, Talk], parts: Mapping[str, str], listed: Mapping[str, bool]) -> None:
    """Set `core` for all talks, using the folder name, fileList.csv or lists/core.txt, in this order."""
    core = set(read_list("core"))
    sources = {
        "folder": {id: part == "core" for id, part in parts.items()},
        "fileList.csv": listed,
        "lists/core.txt": {id: id in core for id in talks},
    }
    for id, talk in talks.items():
        talk.core = next(is_core[id] for is_core in sources.values() if id in is_core)
    for (source, is_core), value in product(sources.items(), (True, False)):
        differing = sorted(id for id in talks if is_core.get(id) is value and talks[id].core is not value)
        if differing:
            log.warning(
                "csj: according to %s, these talks are %s, but the folder or fileList.csv takes precedence "
                "(%d): %s",
                source,
                "core" if value else "not core",
                len(differing),
                abbreviated(differing),
            )


def decoded_lines(raw: bytes) -> list[str]:
    """Split a text file of the corpus into lines, including empty ones.

    The encoding is Shift_JIS (CP932), or UTF-8 if the file was converted. Bytes that are invalid in Shift_JIS
    become U+FFFD.
    """
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # Japanese text in Shift_JIS is not valid UTF-8
    except UnicodeDecodeError:
        lines = [line.decode("cp932", errors="replace") for line in raw.split(b"\n")]
    return [line.rstrip("\r\x1a") for line in lines]


def abbreviated(names: Sequence[str]) -> str:
    """Join the first 40 names for a log message."""
    return " ".join(names[:40]) + (" ..." if len(names) > 40 else "")


def _matches(data: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield all files whose paths match one of the layouts, with the named groups of the match."""
    for layout in _LAYOUTS:
        paths: list[tuple[Path, dict[str, str]]] = [(data, {})]
        for part in layout:
            paths = [
                (folder / name, groups | match.groupdict())
                for folder, groups in paths
                for name in _names(folder, part)
                if (match := re.fullmatch(part, name, re.IGNORECASE))
            ]
        yield from paths


def _names(folder: Path, part: str) -> list[str]:
    if not is_folder(folder):
        return []
    return sorted(read_reliably(lambda: os.listdir(folder), folder)) + ([""] if part.endswith(")?") else [])


def _read_file_list(data: Path) -> dict[str, bool]:
    """Return whether each talk listed in fileList.csv is in the core, keyed by talk id."""
    path = data / "fileList.csv"
    if not is_file(path):
        return {}
    try:
        rows = list(csv.reader(line.replace("\0", "") for line in decoded_lines(read_bytes(path))))
    except csv.Error:
        rows = []
    header = [name.strip() for name in rows[0]] if rows else []
    if "講演ID" not in header or "コア" not in header:
        log.warning("%s: column 講演ID or コア not found; lists/core.txt is used instead of this file", path)
        return {}
    talk, core = header.index("講演ID"), header.index("コア")
    cells = {row[talk].strip(): row[core].strip().lower() for row in rows[1:] if len(row) > max(talk, core)}
    if unknown := sorted({cell for cell in cells.values() if cell not in _CORE + _NOT_CORE}):
        log.warning(
            "%s: unknown values in column コア: %s (expected %s or %s); lists/core.txt is used for the talks "
            "with these values (%d)",
            path,
            abbreviated([repr(cell) for cell in unknown]),
            _CORE[0],
            _NOT_CORE[1],
            sum(cell in unknown for cell in cells.values()),
        )
    return {id: cell in _CORE for id, cell in cells.items() if cell not in unknown}


# --- sets -------------------------------------------------------------------------------------------------


def read_list(name: str | Path) -> list[str]:
    """Read a list of talks with one talk per line, where `#` starts a comment.

    Args:
        name: path of a file (Path), or name of a file in lists/ without .txt (str).
    """
    path = LISTS / f"{name}.txt" if isinstance(name, str) else name
    lines = read_text(path).splitlines()
    entries = [line.partition("#")[0].strip() for line in lines]
    entries = [entry for entry in entries if entry]
    if duplicates := sorted({entry for entry in entries if entries.count(entry) > 1}):
        raise DataError(f"{path}: duplicate talks: {' '.join(duplicates)}")
    return entries


def assign_sets(talks: Mapping[str, Talk], subset: str, dev: str) -> dict[str, str]:
    """Assign talks to train, dev, eval1, eval2 or eval3. Talks that belong to none of them are omitted.

    Args:
        talks: all talks found in the corpus folder.
        subset: core, all, or the path of a list of training talks.
        dev: lhotse or kaldi. With kaldi, no talk is assigned to `dev`, because the first utterances of the
            training data are used for development.

    Raises:
        DataError: a talk is in two sets, or the list `subset` is missing, repeats a talk, or contains a talk
            that is held out or was not found.
    """
    held = held_out(dev)
    if subset in ("core", "all"):
        train = {id for id, talk in talks.items() if (talk.core or subset == "all") and id not in held}
    else:
        train = _read_training_list(subset, talks, held)
    expected = {name: {id for id, other in held.items() if other == name} for name in (*EVALS, "dev")}
    if subset == "core":
        expected["core"] = set(read_list("core"))
    for name, entries in expected.items():
        if missing := sorted(entries - talks.keys()):
            log.warning(
                "csj: talks of %s not found (%d of %d): %s",
                name,
                len(missing),
                len(entries),
                abbreviated(missing),
            )
    if subset == "all" and len(talks) < TALKS:
        log.warning("csj: talks found: %d of the %d in the corpus", len(talks), TALKS)
    sets = {id: name for id, name in held.items() if name != "excluded" and id in talks}
    return sets | dict.fromkeys(sorted(train), "train")


def held_out(dev: str) -> dict[str, str]:
    """Map the id of each talk that is not used for training to the name of its set.

    The names are eval1, eval2, eval3, excluded and, with `dev="lhotse"`, dev.

    Raises:
        DataError: a talk is in two sets.
    """
    names = (*EVALS, "excluded", *(("dev-lhotse",) if dev == "lhotse" else ()))
    held: dict[str, str] = {}
    for name in names:
        for talk in read_list(name):
            kind = name.partition("-")[0]
            if held.setdefault(talk, kind) != kind:
                raise DataError(
                    f"talk {talk} is in two sets, {held[talk]} and {kind}: see the lists in {LISTS}"
                )
    return held


def _read_training_list(subset: str, talks: Mapping[str, Talk], held: Mapping[str, str]) -> set[str]:
    """Read a list of training talks. `assign_sets` describes the errors."""
    path = expand_user(subset)
    if not path.exists():
        matches = difflib.get_close_matches(subset, ("core", "all"), n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
        raise DataError(f"subset={subset}: expected core, all, or a file with the talks to train on{hint}")
    train = set(read_list(path))
    if forbidden := sorted(f"{id} ({held[id]})" for id in train & held.keys()):
        raise DataError(
            f"{path}: remove held-out talks, which must not be trained on: {', '.join(forbidden)}"
        )
    if missing := sorted(train - talks.keys()):
        raise DataError(f"{path}: talks not found in the corpus: {' '.join(missing)}")
    return train
