"""Import and export of fairseq's HuBERT training files: `<split>.tsv`, `<split>.km` and `dict.km.txt`.

The first line of a `.tsv` is a root folder; every other line is `path<TAB>samples` for one utterance. Line n
of the `.km` contains the units of the n-th utterance as text, and the dictionary has one line per unit (see
examples/hubert/simple_kmeans in fairseq). Lines are split as bytes, because Japanese paths may contain
characters that Python treats as line ends or white space in text.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jahubert.audio import AudioSource, audio_length
from jahubert.audio.search import is_sidecar
from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_write, new_folder, remove_folder
from jahubert.frames import HUBERT, MFCC, FrameGrid
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.data.utterances import is_file, read_blocks, read_bytes, read_lines
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import verify_files

DICT = "dict.km.txt"
_ZIP_MEMBER = re.compile(r"(.+\.zip):(\d{1,15}):(\d{1,15})", re.DOTALL)  # path, offset and length in bytes
_MAX_DIGITS = 15  # maximum number of digits in a number; longer ones are rejected


@dataclass(frozen=True)
class TsvEntry:
    """An utterance that is listed in a `.tsv` file."""

    id: str  # split/path, with the path as it is listed in the file
    audio: AudioSource
    n_samples: int  # length as it is listed in the file


def find_tsv_files(folder: Path) -> list[Path]:
    """Return the sorted `.tsv` files in a folder, one per split.

    Raises:
        DataError: the folder has no `.tsv` file.
    """
    paths = sorted(path for path in Path(folder).expanduser().glob("*.tsv") if not is_sidecar(path))
    if not paths:
        raise DataError(f"{folder}: no .tsv file found; use the folder of fairseq's train.tsv and valid.tsv")
    return paths


def read_tsv(path: Path, root: str | None = None) -> Iterator[TsvEntry]:
    """Iterate over the utterances in a `.tsv` file.

    Args:
        root: replacement for the root folder in the first line.

    Raises:
        DataError: a line does not have the form `path<TAB>samples`.
        ReadError, OSError: see `read_blocks`.
    """
    lines = read_lines(path)
    first_line = os.fsdecode(next(lines, b"").rstrip(b"\r\n"))
    for number, line in enumerate(lines, start=2):
        name_bytes, tab, count = line.rstrip(b"\r\n").rpartition(b"\t")
        if not (tab and name_bytes and count.isdigit() and len(count) <= _MAX_DIGITS):
            raise DataError(
                f"{path}, line {number}: expected path<TAB>samples, found {quote(line)}; only line 1 may "
                "be a folder"
            )
        name = os.fsdecode(name_bytes)
        member = _ZIP_MEMBER.fullmatch(name)
        file, offset, length = member.groups() if member else (name, 0, -1)
        audio = AudioSource(os.path.join(root or first_line, file), int(offset), int(length))
        yield TsvEntry(f"{path.stem}/{name}", audio, int(count))


def read_dict(path: Path) -> int:
    """Return the number of units K in a dictionary that lists the units 0..K-1 in any order.

    Raises:
        DataError: the file is missing or unreadable, a unit is missing or listed twice, or a line does not
            start with a unit.
    """
    if not is_file(path):
        raise DataError(f"{path}: file not found; copy it from the folder where the .km files were created")
    units = [line.split()[:1] for line in read_bytes(path).splitlines() if line.strip()]
    is_number = [unit.isdigit() and len(unit) <= _MAX_DIGITS for (unit,) in units]
    if not all(is_number) or sorted(int(unit) for (unit,) in units) != list(range(len(units))):
        raise DataError(
            f"{path}: each unit from 0 to {len(units) - 1} must be on exactly one line; create the file "
            "again, and run the command that appends to it only once"
        )
    return len(units)


def import_units(manifest: Manifest, folder: Path, out: Path, shard_size: int = 2000) -> LabelStore:
    """Convert the `.km` files of `folder` to a label store in `out`.

    If the units have a rate of 100 Hz (units of MFCCs), every second unit is used, because every second MFCC
    frame coincides with a frame of the model. Utterances that are missing from the manifest are skipped.

    Args:
        manifest: a manifest created from the `.tsv` files of `folder`.
        shard_size: number of utterances per shard.

    Raises:
        DataError: a file is missing or malformed, an utterance of the manifest is missing or has a different
            length in the `.tsv`, its number of units does not match its number of frames, a unit is not in
            the dictionary, or a `.km` does not have one line per utterance in its `.tsv`.
        StaleError: `out` contains units with a different origin.
    """
    folder = Path(folder).expanduser()
    n_units = read_dict(folder / DICT)
    header = LabelHeader(
        n_units=n_units,
        feature="fairseq",  # fairseq's files do not specify the actual feature
        layer=None,
        centroids=_hash([folder / DICT, *(_km(tsv) for tsv in find_tsv_files(folder))]),
        model=None,
        manifest=manifest.fingerprint,
        normalize=False,
    )
    # An interrupted import starts over: importing is fast, and the files may have been fixed in the meantime.
    remove_folder(out / "shards")
    writer = LabelWriter(out, header, HUBERT.n_frames(manifest.n_samples), shard_size)
    units = _units(manifest, folder, n_units)
    with progress("importing fairseq units", "utterances", len(manifest)) as done:
        for shard in writer.pending():
            writer.write(shard, list(islice(units, len(writer.rows(shard)))))
            done(len(writer.rows(shard)))
    for _ in units:  # checks the remaining lines
        pass
    writer.finish()
    return LabelStore(out)


def _km(tsv: Path) -> Path:
    path = tsv.with_suffix(".km")
    if not is_file(path):
        raise DataError(f"{path}: file not found; if there are no units for {tsv.name}, remove that file")
    return path


def _hash(paths: list[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        for block in read_blocks(path):
            sha.update(block)
    return sha.hexdigest()


def _units(manifest: Manifest, folder: Path, n_units: int) -> Iterator[np.ndarray]:
    """Yield the 50 Hz units, int64 (S,), of each utterance in manifest order."""
    row = 0
    item: Utterance | None = manifest[0]
    for tsv in find_tsv_files(folder):
        km, grids = _km(tsv), [HUBERT, MFCC]
        lines = read_lines(km)
        for number, entry in enumerate(read_tsv(tsv), start=1):
            line = next(lines, None)
            if line is None:
                raise DataError(
                    f"{km}: line {number} (units of {quote(entry.id)}) is missing: the file is truncated or "
                    f"belongs to a different {tsv.name}"
                )
            if item is None or entry.id != item.id:
                continue
            if entry.n_samples != item.n_samples:
                raise DataError(
                    f"utterance {quote(entry.id)}: {entry.n_samples} samples in {tsv.name}, but the audio "
                    f"has {item.n_samples} at 16 kHz: the units were computed from different audio"
                )
            where = f"utterance {quote(entry.id)} ({km.name}, line {number})"
            unit_N = _parse_units(line, n_units, where)
            grids = [grid for grid in grids if grid.n_frames(entry.n_samples) == len(unit_N)]
            yield unit_N[:: _units_per_frame(grids, len(unit_N), entry.n_samples, where)]
            row += 1
            item = manifest[row] if row < len(manifest) else None
        if any(line.strip() for line in lines):
            raise DataError(f"{km} has more lines than {tsv.name} has utterances: the files do not match")
    if item is not None:
        raise DataError(
            f"utterance {quote(item.id)} of the manifest is missing from the .tsv files in {folder}, or the "
            "order of the utterances differs"
        )


def _parse_units(line: bytes, n_units: int, where: str) -> np.ndarray:
    try:
        unit_N = np.array([int(word) for word in line.split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: expected integers separated by spaces, found {quote(line)}") from error
    if len(unit_N) and not 0 <= unit_N.min() <= unit_N.max() < n_units:
        raise DataError(
            f"{where}: units range from {unit_N.min()} to {unit_N.max()}, but {DICT} has units 0 to "
            f"{n_units - 1}: the files belong to different k-means models"
        )
    return unit_N


def _units_per_frame(grids: list[FrameGrid], n_units: int, n_samples: int, where: str) -> int:
    """Return the number of units per 50 Hz frame in a file.

    Args:
        grids: frame grids that match all utterances read from the file so far.
    """
    if not grids:
        raise DataError(
            f"{where}: {n_units} units for {n_samples} samples, which have {HUBERT.n_frames(n_samples)} "
            f"frames at 50 Hz and {MFCC.n_frames(n_samples)} at 100 Hz (a file must have a single rate). The "
            "units belong to different audio, or frames were lost when features of long audio were computed "
            "in chunks"
        )
    return HUBERT.hop_ratio(grids[0])


def export_experiment(labels: str, folder: str, manifest: str | None) -> dict[str, int]:
    """Export the labels in `exp/NAME/iterN/label`. By default, the manifest of the experiment is used.

    Raises:
        AudioError, DataError: a file is missing or damaged, or the labels cannot be exported (see `export`).
    """
    path = Path(manifest) if manifest else Path(labels).absolute().parent.parent / "prepare/manifest.arrow"
    verify_files(Path(labels))
    return export(Manifest.verified(path), LabelStore(Path(labels)), Path(folder))


def export(manifest: Manifest, labels: LabelStore, folder: Path) -> dict[str, int]:
    """Write fairseq's training files with 50 Hz units, and return the number of utterances per split.

    Raises:
        ConfigError: `folder` exists and is not empty.
        DataError: the store belongs to a different manifest, or a `.tsv` file cannot represent an utterance,
            for example because the utterance is part of a recording or is inside a tar file.
        AudioError: an audio file is missing or unusable.
    """
    labels.check(manifest)
    root = os.path.commonpath([os.path.dirname(manifest[row].audio.path) for row in _sampled_rows(manifest)])
    counts = dict.fromkeys(manifest.counts["splits"], 0)
    with new_folder(folder), ExitStack() as files:
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
    """Return up to 2000 evenly spaced rows, enough to find a folder that contains most audio files."""
    return range(0, len(manifest), max(1, len(manifest) // 1000))


def _tsv_name(item: Utterance, root: str) -> str:
    """Return the `.tsv` name of an utterance: its path, relative if below `root`, and its position in a .zip.

    Raises:
        DataError: a `.tsv` file cannot represent the utterance.
    """
    audio, problem = item.audio, ""
    if item.start or audio_length(audio) != item.n_samples:
        problem = "is only part of its recording; split the recordings into files first"
    elif (audio.offset or audio.length >= 0) and not audio.path.endswith(".zip"):
        problem = "is inside an archive other than .zip; unpack it first"
    elif audio.length < 0 and audio.path.endswith(".zip"):
        problem = "has no byte length in its .zip"
    elif "\t" in audio.path or "\n" in audio.path:
        problem = "has a tab or a line feed in its name; rename it"
    if problem:
        raise DataError(f"fairseq's .tsv cannot represent utterance {quote(item.id)} ({audio}): it {problem}")
    below = audio.path.startswith(root.rstrip(os.sep) + os.sep)
    name = os.path.relpath(audio.path, root) if below else audio.path
    return f"{name}:{audio.offset}:{audio.length}" if audio.length >= 0 else name
