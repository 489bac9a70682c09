"""Where the files of a CSJ edition lie, and which talk belongs to which set.

USB (3rd and 4th edition)  MORPH/SDB/{core,noncore}/ID.sdb  WAV/{core,noncore}/ID.wav, ID-L.wav, ID-R.wav
                           XML/BaseXML/{core,noncore}/ID.xml  TRN/Form1/{core,noncore}/ID.trn  fileList.csv
DVD                        dvd3 ... dvd17/ID/ID.{sdb,wav,xml,trn}
merl                       CSJ2004/{SDB,WAV,XML,TRN}/ID.*  or  CSJ2004/SPEECH/ID/ID.*
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jahubert.errors import DataError

log = logging.getLogger(__name__)

LISTS = Path(__file__).parent / "lists"
EVALS = ("eval1", "eval2", "eval3")
_ID = r"[A-Z]\d\d[FM]\d{4}"
_SIDE = r"(?P<side>core|noncore)"
_FILE = rf"(?P<talk>{_ID})(-(?P<channel>[LR]))?\.(?P<kind>sdb|xml|trn|wav)"
_PLACES = (
    ("MORPH", "SDB", _SIDE, _FILE),
    ("XML", "BaseXML", _SIDE, _FILE),
    ("TRN", "Form1", _SIDE, _FILE),
    ("WAV", _SIDE, _FILE),
    (r"dvd\d+", _ID, _FILE),
    ("(CSJ2004)?", "SDB|WAV|XML|TRN", _FILE),
    ("(CSJ2004)?", "SPEECH", _ID, _FILE),
)
_NOT_CORE = ("", "0", "×", "-", "noncore", "非コア")


@dataclass
class Talk:
    """A talk's files by kind (sdb, xml, trn); `audio` by channel, "" being a file without one in its name."""

    id: str
    audio: dict[str, Path] = field(default_factory=dict)
    transcripts: dict[str, Path] = field(default_factory=dict)
    core: bool = False


def find_talks(data: Path) -> dict[str, Talk]:
    """Every talk below `data`, in the order of their ids, whatever the layout.

    Raises:
        DataError: nothing that looks like CSJ, or a talk that lies in two places.
    """
    talks: dict[str, Talk] = {}
    sides: dict[str, tuple[str, Path]] = {}
    for path, found in _matches(data):
        talk = talks.setdefault(found["talk"].upper(), Talk(found["talk"].upper()))
        side = (found.get("side") or "").lower()
        before = sides.setdefault(talk.id, (side, path))
        if side and before[0] and before[0] != side:
            raise DataError(f"talk {talk.id} is in two subsets: {before[1]} and {path}. Leave one of them")
        kind = found["kind"].lower()
        files, key = (
            (talk.audio, (found["channel"] or "").upper()) if kind == "wav" else (talk.transcripts, kind)
        )
        if key in files:
            raise DataError(f"talk {talk.id} is there twice: {files[key]} and {path}. Leave one of them")
        files[key] = path
    if not talks:
        raise DataError(
            f"{data}: no talk of CSJ here; give data=FOLDER that holds WAV and MORPH/SDB (USB), dvd3 ... "
            "dvd17 (DVD), or CSJ2004 with SDB and WAV"
        )
    listed = _read_file_list(data)
    core = set(read_list("core"))
    for talk in talks.values():
        side = sides[talk.id][0]
        talk.core = side == "core" if side else listed.get(talk.id, talk.id in core)
    if gone := sorted(listed.keys() - talks.keys()):
        log.warning("%d talks of fileList.csv are not there: %s ...", len(gone), " ".join(gone[:5]))
    return dict(sorted(talks.items()))


def _matches(data: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Files at one of the places, with what their path says."""
    for place in _PLACES:
        found: list[tuple[Path, dict[str, str]]] = [(data, {})]
        for part in place:
            found = [
                (folder / name, said | match.groupdict())
                for folder, said in found
                for name in _names(folder, part)
                if (match := re.fullmatch(part, name, re.IGNORECASE))
            ]
        yield from found


def _names(folder: Path, part: str) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(os.listdir(folder)) + ([""] if part.endswith(")?") else [])


def _read_file_list(data: Path) -> dict[str, bool]:
    """Talk -> whether it is in the core, from fileList.csv; {} where there is none or it does not say."""
    path = data / "fileList.csv"
    if not path.is_file():
        return {}
    try:
        rows = list(csv.reader(path.read_bytes().decode("cp932").splitlines()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not Shift_JIS at byte {error.start}; restore it from the corpus") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if "講演ID" not in header or "コア" not in header:
        return {}
    talk, core = header.index("講演ID"), header.index("コア")
    return {
        row[talk].strip(): row[core].strip() not in _NOT_CORE
        for row in rows[1:]
        if len(row) > max(talk, core)
    }


# --- sets -------------------------------------------------------------------------------------------------


def read_list(name: str | Path) -> list[str]:
    """Talks of a list: one a line, `#` starts a comment. A name means a file in lists/."""
    path = LISTS / f"{name}.txt" if isinstance(name, str) else name
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: no list of talks there ({error.strerror})") from error
    entries = [line.partition("#")[0].strip() for line in lines]
    found = [entry for entry in entries if entry]
    if twice := sorted({entry for entry in found if found.count(entry) > 1}):
        raise DataError(f"{path}: listed twice: {' '.join(twice)}")
    return found


def sets_of(talks: Mapping[str, Talk], subset: str, dev: str) -> dict[str, str]:
    """Talk -> train, dev, eval1, eval2 or eval3; talks outside the subset have none.

    `subset`: core, all, or the path of a list of talks to train on. `dev`: lhotse or kaldi; with kaldi,
    whose set is the first utterances of the training data, no talk is in `dev` yet.

    Raises:
        DataError: a talk in two sets, a listed talk that is not there, or a talk to train on that is in a
            test set or by a test speaker.
    """
    held: dict[str, str] = {}
    lists = {name: read_list(name) for name in (*EVALS, "excluded")}
    lists |= {"dev": read_list("dev-lhotse")} if dev == "lhotse" else {}
    for name, entries in lists.items():
        for talk in entries:
            if held.setdefault(talk, name) != name:
                raise DataError(
                    f"talk {talk} is in two sets, {held[talk]} and {name}: see the lists in {LISTS}"
                )
    if subset in ("core", "all"):
        train = {id for id, talk in talks.items() if (talk.core or subset == "all") and id not in held}
    else:
        path = Path(subset).expanduser()
        train = set(read_list(path))
        if refused := sorted(f"{id} ({held[id]})" for id in train & held.keys()):
            raise DataError(
                f"{path}: held out, and so not to be trained on: {', '.join(refused)}. Take them out"
            )
        if gone := sorted(train - talks.keys()):
            raise DataError(f"{path}: no such talks in the corpus: {' '.join(gone)}")
    for name in (*EVALS, "dev"):
        if gone := [id for id in lists.get(name, ()) if id not in talks]:
            log.warning(
                "%s: %d of %d talks are not there: %s", name, len(gone), len(lists[name]), " ".join(gone)
            )
    sets = {id: name for id, name in held.items() if name != "excluded" and id in talks}
    return sets | dict.fromkeys(sorted(train), "train")
