"""fairseq's HuBERT files, in and out: `<split>.tsv`, `<split>.km` and `dict.km.txt`.

A `.tsv` is a root folder and then `path<TAB>samples` for each utterance; line n of the `.km` beside it holds
the units of the n-th utterance as text; the dictionary has a line for each unit (fairseq,
examples/hubert/simple_kmeans). Lines are split as bytes: a Japanese path may hold characters that text mode
takes for the end of a line, or for space to be stripped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jahubert.audio import AudioSource, audio_length
from jahubert.errors import DataError
from jahubert.frames import HUBERT, MFCC, FrameGrid
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import atomic_text

DICT = "dict.km.txt"
_ZIPPED = re.compile(r"(.+\.zip):(\d+):(\d+)", re.DOTALL)  # path, offset and length in bytes


@dataclass(frozen=True)
class TsvEntry:
    """A line of a `.tsv`."""

    id: str  # split/path, as it stands in the file
    audio: AudioSource
    n_samples: int  # as the file says


def find_tsv_files(folder: Path) -> list[Path]:
    """The `.tsv` files of a folder, in the order in which they are read; each is a split.

    Raises:
        DataError: there is none.
    """
    found = sorted(Path(folder).expanduser().glob("*.tsv"))
    if not found:
        raise DataError(f"{folder}: no .tsv file; give the folder of fairseq's train.tsv and valid.tsv")
    return found


def read_tsv(path: Path, root: str | None = None) -> Iterator[TsvEntry]:
    """The utterances of a `.tsv`, one at a time; `root` stands in for the folder of its first line.

    Raises:
        DataError: a line that is not `path<TAB>samples`, by its number.
    """
    with path.open("rb") as lines:
        said = os.fsdecode(next(lines, b"").rstrip(b"\r\n"))
        for number, line in enumerate(lines, start=2):
            name_bytes, tab, count = line.rstrip(b"\r\n").rpartition(b"\t")
            if not (tab and name_bytes and count.isdigit()):
                raise DataError(
                    f"{path}, line {number}: expected path<TAB>samples, found {line[:80]!r}; behind the "
                    "root folder in line 1, every line is an utterance"
                )
            name = os.fsdecode(name_bytes)
            zipped = _ZIPPED.fullmatch(name)
            file, offset, length = zipped.groups() if zipped else (name, 0, -1)
            audio = AudioSource(os.path.join(root or said, file), int(offset), int(length))
            yield TsvEntry(f"{path.stem}/{name}", audio, int(count))


def read_dict(path: Path) -> int:
    """The number of units K of a dictionary of the units 0..K-1, in any order.

    Raises:
        DataError: no file, a unit that is missing or there twice, or something else than a unit.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: copy it from where the .km files were made")
    units = [line.split()[:1] for line in path.read_bytes().splitlines() if line.strip()]
    if sorted(int(unit) if unit.isdigit() else -1 for (unit,) in units) != list(range(len(units))):
        raise DataError(
            f"{path}: its {len(units)} lines are not the units 0 to {len(units) - 1}, each once. The usual "
            "cause is that the command that writes it appends, and ran twice"
        )
    return len(units)


def import_units(manifest: Manifest, folder: Path, out: Path, shard_size: int = 2000) -> LabelStore:
    """A label store in `out` of the `.km` files in `folder`, for the manifest made of the `.tsv` there.

    Units at 100 Hz (of MFCCs) are taken every second, which is exact. Utterances that the manifest left out
    are passed over. What is left is held to be right only if it fits sample for sample and frame for frame.

    Raises:
        DataError: naming the utterance: units and frames, or the lengths in `.tsv` and manifest, differ; a
            unit that the dictionary does not have; lines that are missing or too many.
        StaleError: `out` holds units that were made from something else.
    """
    folder = Path(folder).expanduser()
    n_units = read_dict(folder / DICT)
    header = LabelHeader(
        n_units=n_units,
        feature="fairseq",  # its files do not say which
        layer=None,
        centroids=_hash([folder / DICT, *(_km(tsv) for tsv in find_tsv_files(folder))]),
        model=None,
        manifest=manifest.fingerprint,
        normalize=False,
    )
    # Reading text is quick, so what was broken off begins anew: the files may have been mended since.
    shutil.rmtree(out / "shards", ignore_errors=True)
    writer = LabelWriter(out, header, HUBERT.n_frames(manifest.n_samples), shard_size)
    units = _units(manifest, folder, n_units)
    with progress("units of fairseq's files", "utterances", len(manifest)) as done:
        for shard in writer.pending():
            writer.write(shard, list(islice(units, len(writer.rows(shard)))))
            done(len(writer.rows(shard)))
    for _ in units:  # what the last lines say is checked too
        pass
    writer.finish()
    return LabelStore(out)


def _km(tsv: Path) -> Path:
    path = tsv.with_suffix(".km")
    if not path.is_file():
        raise DataError(f"{path} is missing: every .tsv needs its units; take a .tsv without any elsewhere")
    return path


def _hash(paths: list[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _units(manifest: Manifest, folder: Path, n_units: int) -> Iterator[np.ndarray]:
    """Units at 50 Hz, int64 (S,), of each utterance of the manifest, in its order."""
    row = 0
    wanted: Utterance | None = manifest[0]
    for tsv in find_tsv_files(folder):
        km, grids = _km(tsv), [HUBERT, MFCC]
        with km.open("rb") as lines:
            for number, entry in enumerate(read_tsv(tsv), start=1):
                line = next(lines, None)
                if line is None:
                    raise DataError(
                        f"{km} ends before line {number}, the units of {entry.id!r}: it is cut short, or "
                        f"belongs to another {tsv.name}"
                    )
                if wanted is None or entry.id != wanted.id:
                    continue
                if entry.n_samples != wanted.n_samples:
                    raise DataError(
                        f"utterance {entry.id!r}: {tsv.name} says {entry.n_samples} samples, but the audio "
                        f"has {wanted.n_samples} at 16 kHz: it is not what the units were made from"
                    )
                where = f"utterance {entry.id!r} ({km.name}, line {number})"
                unit_N = _parsed(line, n_units, where)
                grids = [grid for grid in grids if grid.n_frames(entry.n_samples) == len(unit_N)]
                yield unit_N[:: _step(grids, len(unit_N), entry.n_samples, where)]
                row += 1
                wanted = manifest[row] if row < len(manifest) else None
            if any(line.strip() for line in lines):
                raise DataError(
                    f"{km} has more lines than {tsv.name} has utterances: they do not belong together"
                )
    if wanted is not None:
        raise DataError(
            f"utterance {wanted.id!r} of the manifest is in no .tsv of {folder}, or in another order"
        )


def _parsed(line: bytes, n_units: int, where: str) -> np.ndarray:
    try:
        unit_N = np.array([int(word) for word in line.split()], np.int64)
    except ValueError as error:
        raise DataError(f"{where}: units are integers between spaces, found {line[:60]!r}") from error
    if len(unit_N) and not 0 <= unit_N.min() <= unit_N.max() < n_units:
        raise DataError(
            f"{where}: units {unit_N.min()} to {unit_N.max()}, but {DICT} has 0 to {n_units - 1}: they are "
            "of another k-means"
        )
    return unit_N


def _step(grids: list[FrameGrid], n_units: int, n_samples: int, where: str) -> int:
    """How many units there are for one frame: `grids` are those that this and all utterances before fit."""
    if not grids:
        raise DataError(
            f"{where}: {n_units} units for {n_samples} samples, which are {HUBERT.n_frames(n_samples)} "
            f"frames at 50 Hz and {MFCC.n_frames(n_samples)} at 100 Hz (one rate for a whole file). The "
            "units are of other audio, or a frame went lost where features of long audio were made in pieces"
        )
    return HUBERT.step_in(grids[0])


def export_experiment(labels: str, folder: str, manifest: str | None) -> dict[str, int]:
    """`export` of a folder `exp/NAME/iterN/label`; the manifest is that experiment's if none is given."""
    path = Path(manifest) if manifest else Path(labels).absolute().parent.parent / "prepare/manifest.arrow"
    return export(Manifest(path), LabelStore(Path(labels)), Path(folder))


def export(manifest: Manifest, labels: LabelStore, folder: Path) -> dict[str, int]:
    """Write the files that fairseq trains from, at 50 Hz; returns the utterances of each split.

    Raises:
        DataError: the store is not of this manifest, or an utterance is what a `.tsv` cannot say: a part of a
            recording, a member of a tar, a name with a tab or a new line.
    """
    labels.check(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    root = os.path.commonpath([os.path.dirname(manifest[row].audio.path) for row in _spread(manifest)])
    counts = dict.fromkeys(manifest.counts["splits"], 0)
    with ExitStack() as files:
        dictionary = files.enter_context(atomic_text(folder / DICT))
        dictionary.writelines(f"{unit} 1\n" for unit in range(labels.header.n_units))
        tsv, km = (
            {split: files.enter_context(atomic_text(folder / f"{split}{kind}")) for split in counts}
            for kind in (".tsv", ".km")
        )
        for file in tsv.values():
            file.write(f"{root}\n")
        for row in range(len(manifest)):
            item = manifest[row]
            tsv[item.split].write(f"{_name(item, root)}\t{item.n_samples}\n")
            km[item.split].write(" ".join(map(str, labels[row].tolist())) + "\n")
            counts[item.split] += 1
    return counts


def _spread(manifest: Manifest) -> range:
    """Some utterances from all over the manifest: enough to find a folder above most of them."""
    return range(0, len(manifest), max(1, len(manifest) // 1000))


def _name(item: Utterance, root: str) -> str:
    """The path of an utterance for a `.tsv` with this root; an absolute one where it lies elsewhere."""
    audio, problem = item.audio, ""
    if item.start or audio_length(audio) != item.n_samples:
        problem = "is a part of its recording; cut the recordings first"
    elif (audio.offset or audio.length >= 0) and not audio.path.endswith(".zip"):
        problem = "lies inside an archive that is no .zip; unpack it first"
    elif audio.length < 0 and audio.path.endswith(".zip"):
        problem = "has no length in its .zip"
    elif "\t" in audio.path or "\n" in audio.path:
        problem = "has a tab or a new line in its name; rename it"
    if problem:
        raise DataError(f"utterance {item.id!r} ({audio}) {problem}: fairseq's .tsv cannot say it")
    below = audio.path.startswith(root.rstrip(os.sep) + os.sep)
    name = os.path.relpath(audio.path, root) if below else audio.path
    return f"{name}:{audio.offset}:{audio.length}" if audio.length >= 0 else name
