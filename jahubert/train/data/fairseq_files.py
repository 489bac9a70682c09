"""Import and export of fairseq's HuBERT files: `<split>.tsv`, `<split>.km` and `dict.km.txt`.

A `.tsv` has a root folder in line 1, followed by one line `path<TAB>samples` per utterance. Line n of the
`.km` holds the units of the n-th utterance as text; the dictionary has one line per unit (fairseq,
examples/hubert/simple_kmeans). Lines are split as bytes, since Japanese paths may contain characters that
text mode takes for line ends or white space.
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
from jahubert.formats.atomic import atomic_write
from jahubert.frames import HUBERT, MFCC, FrameGrid
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.experiment.progress import progress

DICT = "dict.km.txt"
_ZIP_MEMBER = re.compile(r"(.+\.zip):(\d+):(\d+)", re.DOTALL)  # path, offset and length in bytes


@dataclass(frozen=True)
class TsvEntry:
    """An utterance of a `.tsv`."""

    id: str  # split/path, with the path as it is written in the file
    audio: AudioSource
    n_samples: int  # according to the file


def find_tsv_files(folder: Path) -> list[Path]:
    """The `.tsv` files of a folder, one per split, in reading order.

    Raises:
        DataError: no `.tsv` found.
    """
    paths = sorted(Path(folder).expanduser().glob("*.tsv"))
    if not paths:
        raise DataError(f"{folder}: no .tsv file found; give the folder of fairseq's train.tsv and valid.tsv")
    return paths


def read_tsv(path: Path, root: str | None = None) -> Iterator[TsvEntry]:
    """Iterate over the utterances of a `.tsv`; `root` replaces the root folder in its first line.

    Raises:
        DataError: a line that is not `path<TAB>samples`, with its number.
    """
    with path.open("rb") as lines:
        first_line = os.fsdecode(next(lines, b"").rstrip(b"\r\n"))
        for number, line in enumerate(lines, start=2):
            name_bytes, tab, count = line.rstrip(b"\r\n").rpartition(b"\t")
            if not (tab and name_bytes and count.isdigit()):
                raise DataError(
                    f"{path}, line {number}: expected path<TAB>samples, found {line[:80]!r}; only line 1 is "
                    "the root folder"
                )
            name = os.fsdecode(name_bytes)
            member = _ZIP_MEMBER.fullmatch(name)
            file, offset, length = member.groups() if member else (name, 0, -1)
            audio = AudioSource(os.path.join(root or first_line, file), int(offset), int(length))
            yield TsvEntry(f"{path.stem}/{name}", audio, int(count))


def read_dict(path: Path) -> int:
    """Read the number of units K from a dictionary of the units 0..K-1, in any order.

    Raises:
        DataError: file not found, a missing or duplicate unit, or a line that is not a unit.
    """
    if not path.is_file():
        raise DataError(f"{path}: file not found; copy it from where the .km files were made")
    units = [line.split()[:1] for line in path.read_bytes().splitlines() if line.strip()]
    if sorted(int(unit) if unit.isdigit() else -1 for (unit,) in units) != list(range(len(units))):
        raise DataError(
            f"{path}: expected each of the units 0 to {len(units) - 1} once on its {len(units)} lines. The "
            "usual cause: the command that writes the file appends to it, and was run twice"
        )
    return len(units)


def import_units(manifest: Manifest, folder: Path, out: Path, shard_size: int = 2000) -> LabelStore:
    """Convert the `.km` files of `folder` to a label store in `out`; `manifest` was made from its `.tsv`.

    Of units at 100 Hz (from MFCCs) every second one is taken, which is exact. Utterances that are not in the
    manifest are skipped. The others must match in samples and in frames.

    Raises:
        DataError: units and frames, or the lengths in `.tsv` and manifest, differ (names the utterance); a
            unit outside the dictionary; missing or surplus lines.
        StaleError: `out` holds units of another origin.
    """
    folder = Path(folder).expanduser()
    n_units = read_dict(folder / DICT)
    header = LabelHeader(
        n_units=n_units,
        feature="fairseq",  # its files do not specify the feature
        layer=None,
        centroids=_hash([folder / DICT, *(_km(tsv) for tsv in find_tsv_files(folder))]),
        model=None,
        manifest=manifest.fingerprint,
        normalize=False,
    )
    # An interrupted import starts over: reading is quick, and the files may have been fixed since.
    shutil.rmtree(out / "shards", ignore_errors=True)
    writer = LabelWriter(out, header, HUBERT.n_frames(manifest.n_samples), shard_size)
    units = _units(manifest, folder, n_units)
    with progress("units of fairseq's files", "utterances", len(manifest)) as done:
        for shard in writer.pending():
            writer.write(shard, list(islice(units, len(writer.rows(shard)))))
            done(len(writer.rows(shard)))
    for _ in units:  # check the remaining lines
        pass
    writer.finish()
    return LabelStore(out)


def _km(tsv: Path) -> Path:
    path = tsv.with_suffix(".km")
    if not path.is_file():
        raise DataError(f"{path}: file not found; every .tsv needs one, so move a .tsv without units away")
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
    item: Utterance | None = manifest[0]
    for tsv in find_tsv_files(folder):
        km, grids = _km(tsv), [HUBERT, MFCC]
        with km.open("rb") as lines:
            for number, entry in enumerate(read_tsv(tsv), start=1):
                line = next(lines, None)
                if line is None:
                    raise DataError(
                        f"{km} ends before line {number}, the units of {entry.id!r}: it is truncated, or "
                        f"belongs to another {tsv.name}"
                    )
                if item is None or entry.id != item.id:
                    continue
                if entry.n_samples != item.n_samples:
                    raise DataError(
                        f"utterance {entry.id!r}: {entry.n_samples} samples in {tsv.name}, but the audio has "
                        f"{item.n_samples} at 16 kHz: the units were made from other audio"
                    )
                where = f"utterance {entry.id!r} ({km.name}, line {number})"
                unit_N = _parse_units(line, n_units, where)
                grids = [grid for grid in grids if grid.n_frames(entry.n_samples) == len(unit_N)]
                yield unit_N[:: _units_per_frame(grids, len(unit_N), entry.n_samples, where)]
                row += 1
                item = manifest[row] if row < len(manifest) else None
            if any(line.strip() for line in lines):
                raise DataError(f"{km} has more lines than {tsv.name} has utterances: they do not match")
    if item is not None:
        raise DataError(
            f"utterance {item.id!r} of the manifest is in no .tsv of {folder}, or in another order"
        )


def _parse_units(line: bytes, n_units: int, where: str) -> np.ndarray:
    try:
        unit_N = np.array([int(word) for word in line.split()], np.int64)
    except ValueError as error:
        raise DataError(f"{where}: expected integers separated by spaces, found {line[:60]!r}") from error
    if len(unit_N) and not 0 <= unit_N.min() <= unit_N.max() < n_units:
        raise DataError(
            f"{where}: units {unit_N.min()} to {unit_N.max()}, but {DICT} has 0 to {n_units - 1}: they "
            "belong to another k-means"
        )
    return unit_N


def _units_per_frame(grids: list[FrameGrid], n_units: int, n_samples: int, where: str) -> int:
    """Units per 50 Hz frame; `grids` are the frame grids that match all utterances of the file so far."""
    if not grids:
        raise DataError(
            f"{where}: {n_units} units for {n_samples} samples, which have {HUBERT.n_frames(n_samples)} "
            f"frames at 50 Hz and {MFCC.n_frames(n_samples)} at 100 Hz (one rate per file). Either the units "
            "belong to other audio, or frames were lost where features of long audio were computed in chunks"
        )
    return HUBERT.hop_ratio(grids[0])


def export_experiment(labels: str, folder: str, manifest: str | None) -> dict[str, int]:
    """`export` of a folder `exp/NAME/iterN/label`; the manifest defaults to the one of the experiment."""
    path = Path(manifest) if manifest else Path(labels).absolute().parent.parent / "prepare/manifest.arrow"
    return export(Manifest(path), LabelStore(Path(labels)), Path(folder))


def export(manifest: Manifest, labels: LabelStore, folder: Path) -> dict[str, int]:
    """Write fairseq's training files, with units at 50 Hz; return the number of utterances per split.

    Raises:
        DataError: the store belongs to another manifest, or a `.tsv` cannot represent an utterance: a part
            of a recording, a member of a tar, a name with a tab or a line feed.
    """
    labels.check(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    root = os.path.commonpath([os.path.dirname(manifest[row].audio.path) for row in _sampled_rows(manifest)])
    counts = dict.fromkeys(manifest.counts["splits"], 0)
    with ExitStack() as files:
        dictionary = files.enter_context(atomic_write(folder / DICT))
        dictionary.writelines(f"{unit} 1\n" for unit in range(labels.header.n_units))
        tsv, km = (
            {split: files.enter_context(atomic_write(folder / f"{split}{kind}")) for split in counts}
            for kind in (".tsv", ".km")
        )
        for file in tsv.values():
            file.write(f"{root}\n")
        for row in range(len(manifest)):
            item = manifest[row]
            tsv[item.split].write(f"{_tsv_name(item, root)}\t{item.n_samples}\n")
            km[item.split].write(" ".join(map(str, labels[row].tolist())) + "\n")
            counts[item.split] += 1
    return counts


def _sampled_rows(manifest: Manifest) -> range:
    """About 1000 evenly spaced rows, enough to find a folder that contains most of the audio."""
    return range(0, len(manifest), max(1, len(manifest) // 1000))


def _tsv_name(item: Utterance, root: str) -> str:
    """The path of an utterance relative to `root`, or absolute if it is outside."""
    audio, problem = item.audio, ""
    if item.start or audio_length(audio) != item.n_samples:
        problem = "is a part of its recording; cut the recordings first"
    elif (audio.offset or audio.length >= 0) and not audio.path.endswith(".zip"):
        problem = "is inside an archive other than .zip; unpack it first"
    elif audio.length < 0 and audio.path.endswith(".zip"):
        problem = "has no length in its .zip"
    elif "\t" in audio.path or "\n" in audio.path:
        problem = "has a tab or a line feed in its name; rename it"
    if problem:
        raise DataError(f"fairseq's .tsv cannot represent utterance {item.id!r} ({audio}): it {problem}")
    below = audio.path.startswith(root.rstrip(os.sep) + os.sep)
    name = os.path.relpath(audio.path, root) if below else audio.path
    return f"{name}:{audio.offset}:{audio.length}" if audio.length >= 0 else name
