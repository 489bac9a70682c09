"""Where the files of a CSJ edition lie, and which talk belongs to which set.

USB (3rd and 4th edition)  MORPH/SDB/{core,noncore}/ID.sdb  WAV/{core,noncore}/ID.wav, ID-L.wav, ID-R.wav
                           XML/BaseXML/{core,noncore}/ID.xml  TRN/Form1/{core,noncore}/ID.trn  fileList.csv
DVD                        dvd3 ... dvd17/ID/ID.{sdb,wav,xml,trn}
merl                       CSJ2004/{SDB,WAV,XML,TRN}/ID.*  or  CSJ2004/SPEECH/ID/ID.*
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
TALKS = 3302  # of the whole corpus, as NINJAL says
# What a cell of fileList.csv says; public readers of it compare with コア, the other talks have ノンコア.
_CORE = ("コア", "core", "○", "◯", "〇", "1")
_NOT_CORE = ("", "ノンコア", "非コア", "noncore", "non-core", "×", "-", "0")


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
    _mark_core(talks, {id: side for id, (side, _) in sides.items() if side}, listed)
    if gone := sorted(listed.keys() - talks.keys()):
        log.warning("%d talks of fileList.csv are not there: %s ...", len(gone), " ".join(gone[:5]))
    return dict(sorted(talks.items()))


def _mark_core(talks: Mapping[str, Talk], sides: Mapping[str, str], listed: Mapping[str, bool]) -> None:
    """Say which talks are the core: by their folder, else the file list, else lists/core.txt."""
    core = set(read_list("core"))
    sources = {
        "their folder": {id: side == "core" for id, side in sides.items()},
        "fileList.csv": listed,
        "lists/core.txt": {id: id in core for id in talks},
    }
    for id, talk in talks.items():
        talk.core = next(said[id] for said in sources.values() if id in said)
    for (source, said), as_core in product(sources.items(), (True, False)):
        if other := sorted(id for id in talks if said.get(id) is as_core and talks[id].core is not as_core):
            log.warning(
                "csj: by %s %d talks are %s, but their folder or fileList.csv counts, and says otherwise: %s",
                source,
                len(other),
                "core" if as_core else "not core",
                _some(other),
            )


def _some(names: Sequence[str]) -> str:
    """The first names, and whether there are more; all of any list but the core's."""
    return " ".join(names[:40]) + " ..." * (len(names) > 40)


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
    """Talk -> whether it is in the core, from fileList.csv; without the talks of which it does not say."""
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
    cells = {row[talk].strip(): row[core].strip().lower() for row in rows[1:] if len(row) > max(talk, core)}
    if odd := sorted({cell for cell in cells.values() if cell not in _CORE + _NOT_CORE}):
        n = sum(cell in odd for cell in cells.values())
        log.warning(
            "%s: the column コア of %d talks says neither %s nor %s, but %s; lists/core.txt decides for them",
            path,
            n,
            _CORE[0],
            _NOT_CORE[1],
            _some([repr(cell) for cell in odd]),
        )
    return {id: cell in _CORE for id, cell in cells.items() if cell not in odd}


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
    held = held_out(dev)
    if subset in ("core", "all"):
        train = {id for id, talk in talks.items() if (talk.core or subset == "all") and id not in held}
    else:
        train = _own_list(subset, talks, held)
    wanted = {name: {id for id, of in held.items() if of == name} for name in (*EVALS, "dev")}
    wanted |= {"core": set(read_list("core"))} if subset == "core" else {}
    for name, entries in wanted.items():
        if gone := sorted(entries - talks.keys()):
            log.warning(
                "csj: %d of the %d talks of %s are not there: %s", len(gone), len(entries), name, _some(gone)
            )
    if subset == "all" and len(talks) < TALKS:
        log.warning("csj: %d talks are here, of the %d of the corpus", len(talks), TALKS)
    sets = {id: name for id, name in held.items() if name != "excluded" and id in talks}
    return sets | dict.fromkeys(sorted(train), "train")


def held_out(dev: str) -> dict[str, str]:
    """Talk -> the set for which it is never trained on: eval1, eval2, eval3, excluded, and dev with lhotse.

    Raises:
        DataError: a talk in two of them.
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


def _own_list(subset: str, talks: Mapping[str, Talk], held: Mapping[str, str]) -> set[str]:
    """The talks of a user's list."""
    path = Path(subset).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(subset, ("core", "all"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"subset={subset}: neither core nor all, nor a file with the talks to train on{hint}")
    train = set(read_list(path))
    if refused := sorted(f"{id} ({held[id]})" for id in train & held.keys()):
        raise DataError(f"{path}: held out, and so not to be trained on: {', '.join(refused)}. Take them out")
    if gone := sorted(train - talks.keys()):
        raise DataError(f"{path}: no such talks in the corpus: {' '.join(gone)}")
    return train
