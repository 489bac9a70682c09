"""Output files of `jahubert features`: one .npy per recording, or a single safetensors file.

Each feature file is written atomically. `features.json` records the model and the settings, and
`sources.jsonl` records which recording each file belongs to. An interrupted run can therefore resume, a
folder never mixes features that were computed with different settings, and features are never taken for those
of another recording.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from jahubert.cli.console import STDIN
from jahubert.errors import DISK_FULL, ConfigError, DataError, StaleError, file_system_error
from jahubert.formats.atomic import atomic_write, remove_folder
from jahubert.formats.lock import LOCK_NAME, run_lock

SINGLE = ".safetensors"
RECORD = "features.json"
SOURCES = "sources.jsonl"

# Absolute path without symbolic links, size in bytes and modification time (ns) of a recording.
Source = dict[str, Any]


@contextmanager
def feature_files(
    output: Path, settings: dict[str, Any], bases: Iterable[Path] = ()
) -> Iterator[FeatureFiles]:
    """Lock the folder of an output for this run, and yield a `FeatureFiles` for it.

    Args:
        output: a folder, or a .safetensors file that `FeatureFiles.finish` assembles from the folder
            `OUT.safetensors.parts`.
        settings: all settings that affect the features, as JSON-compatible values.
        bases: paths of the .npy files to write, within the folder and without the suffix.

    Raises:
        BusyError: another run is using the folder.
        ConfigError: the output file already exists, or the folder cannot be created or written to.
        DataError: `features.json` is damaged.
        StaleError: the features in the folder were computed with different settings, or a file to write was
            not written by `jahubert features`.
    """
    folder = parts_folder(output)
    if not folder.exists():
        _check_incomplete(output)
    try:
        with ExitStack() as lock:
            with _report_unwritable(output):
                folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(run_lock(folder))
            _check_incomplete(output)  # another run may have completed it in the meantime
            _check_origin(folder, bases)
            yield FeatureFiles(output, settings)
    finally:
        if folder != output:
            with suppress(OSError):  # the folder contains parts, or the lock of another run
                folder.rmdir()


def _check_incomplete(output: Path) -> None:
    """Raise ConfigError if a safetensors file is complete.

    Parts with a record next to the file are from a run that ended before it deleted them.
    """
    folder = parts_folder(output)
    if folder != output and output.exists() and not (folder / RECORD).exists():
        raise ConfigError(f"-o {output} already exists; remove it or choose another name")


def _check_origin(folder: Path, bases: Iterable[Path]) -> None:
    """Raise StaleError if an output file exists, but is not from a run of `jahubert features`.

    Each run writes `features.json` before the first features.
    """
    if (folder / RECORD).exists():
        return
    for base in bases:
        if (path := _array_path(folder, base)).exists():
            raise StaleError(
                f"{path} was not written by jahubert features, because {folder} has no {RECORD}; "
                "choose another output folder, or remove the file"
            )


@contextmanager
def _report_unwritable(output: Path) -> Iterator[None]:
    """Convert file system errors, except for a full disk, to a ConfigError that names the option."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(f"-o {output} cannot be written: {error.strerror}") from error


class FeatureFiles:
    """Writer for the features of one run, or of several runs with the same settings (see `feature_files`)."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings
        self.folder = parts_folder(output)
        record = self.folder / RECORD
        if record.exists():
            recorded = _read_record(record)
            differences = [
                f"{name}={recorded.get(name)} (requested: {value})"
                for name, value in settings.items()
                if recorded.get(name) != value
            ]
            if differences:
                raise StaleError(
                    f"{self.folder} contains features that were computed with {', '.join(differences)}; "
                    "remove the folder or choose another one"
                )
        else:
            with _report_unwritable(output), atomic_write(record) as file:
                file.write(json.dumps(settings, indent=2) + "\n")
        self.written = _read_sources(self.folder / SOURCES)
        self.sources: dict[str, Source] = {}  # current source of each output file for which `has` was called

    def has(self, base: Path, audio: str) -> bool:
        """Return whether the features of `audio` exist and the recording has not changed since.

        Features of standard input are always recomputed. If a recording was moved, its new path is recorded.

        Raises:
            StaleError: the output file contains the features of another recording.
        """
        path, key = self._path(base), os.fspath(base)
        source = self.sources[key] = _source_of(audio)
        written = self.written.get(key)
        if written is None or not path.exists():
            return False
        if written.get("path") != source["path"]:
            if not _was_moved(written, source):
                raise StaleError(
                    f"{path} contains the features of {written.get('path')}, not of {source['path']}; choose "
                    f"another output, or remove {self.folder}"
                )
            self._record(key)
        return source["size"] is not None and self.written[key] == source

    def write(self, base: Path, chunks: Iterable[Tensor], shape: tuple[int, ...]) -> int:
        """Write chunks of frames (S, *shape) to a float32 .npy file, and return the number of frames."""
        path = self._path(base)
        path.parent.mkdir(parents=True, exist_ok=True)
        n_frames = 0
        with atomic_write(path, "wb") as file:
            _header(file, (0, *shape))
            for chunk in chunks:
                file.write(chunk.contiguous().numpy().tobytes())
                n_frames += len(chunk)
            file.seek(0)  # numpy pads the header, so it has room for the final frame count
            _header(file, (n_frames, *shape))
        self._record(os.fspath(base))
        return n_frames

    def finish(self, bases: Iterable[Path]) -> None:
        """Sort `sources.jsonl` of an output folder, or assemble a safetensors file from the given parts."""
        if self.folder == self.output:
            _write_sources(self.folder / SOURCES, self.written)
            return
        files = sorted({self._path(base) for base in bases})
        header: dict[str, Any] = {"__metadata__": {k: json.dumps(v) for k, v in self.settings.items()}}
        sizes, end = [], 0  # size of each array in bytes
        for file in files:
            # Only the shape is kept, so that the file is closed: the number of open files is limited.
            shape = np.load(file, mmap_mode="r").shape
            sizes.append(np.dtype(np.float32).itemsize * math.prod(shape))
            offsets = [end, end + sizes[-1]]
            header[_key(file.relative_to(self.folder))] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": offsets,
            }
            end += sizes[-1]
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with atomic_write(self.output, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for file, size in zip(files, sizes, strict=True):
                with file.open("rb") as part:
                    part.seek(-size, os.SEEK_END)
                    shutil.copyfileobj(part, out)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove everything but the lock, `sources.jsonl` first, so that no run uses an incomplete folder."""
        order = {SOURCES: 0, RECORD: 2, LOCK_NAME: 3}
        for path in sorted(self.folder.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.is_dir():
                remove_folder(path)
            elif path.name != LOCK_NAME:
                path.unlink()

    def _record(self, key: str) -> None:
        """Record the current source of an output file."""
        self.written[key] = self.sources[key]
        _append_line(self.folder / SOURCES, {"file": key, **self.sources[key]})

    def _path(self, base: Path) -> Path:
        return _array_path(self.folder, base)


def _array_path(folder: Path, base: Path) -> Path:
    return folder / f"{base}.npy"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); delete its folder and rerun the command") from error
    if not isinstance(recorded, dict):
        raise DataError(f"{path}: damaged (not a JSON object); delete its folder and rerun the command")
    return recorded


def _source_of(audio: str) -> Source:
    """Return the identity of a recording. Size and time are None for standard input and missing files."""
    path = STDIN if audio == STDIN else os.path.realpath(audio)
    try:
        status = None if audio == STDIN else os.stat(path)
    except OSError:
        status = None
    if status is None:
        return {"path": path, "size": None, "mtime_ns": None}
    return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _was_moved(written: Source, source: Source) -> bool:
    """Return whether two sources with different paths are the same recording, which has been moved.

    If the old path still exists, the recordings are considered different, because the files of a corpus may
    have equal sizes and times.
    """
    if source["size"] is None or {**written, "path": source["path"]} != source:
        return False
    return isinstance(written.get("path"), str) and not os.path.exists(written["path"])


def _read_sources(path: Path) -> dict[str, Source]:
    """Return the last source recorded for each file. Incomplete lines, as after a full disk, are skipped."""
    sources: dict[str, Source] = {}
    if not path.exists():
        return sources
    for line in path.read_bytes().splitlines():
        try:
            source = json.loads(line)
            sources[source.pop("file")] = source
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            continue
    return sources


def _write_sources(path: Path, sources: dict[str, Source]) -> None:
    """Rewrite the file with one line per output file, sorted, dropping replaced and incomplete lines."""
    content = "".join(json.dumps({"file": key, **source}) + "\n" for key, source in sorted(sources.items()))
    if path.exists() and path.read_bytes() != content.encode():
        with atomic_write(path) as file:
            file.write(content)


def _append_line(path: Path, content: dict[str, Any]) -> None:
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the previous line is incomplete
                    file.write(b"\n")
            file.write(json.dumps(content).encode() + b"\n")
    except OSError as error:  # write errors do not name the file
        raise file_system_error(error, path) or error from error


def parts_folder(output: Path) -> Path:
    """Return the folder for the .npy files, which is a separate one if the output is a .safetensors file."""
    return output.with_name(output.name + ".parts") if output.suffix == SINGLE else output


def check_keys(output: Path, bases: Iterable[Path]) -> None:
    """Raise ConfigError if a safetensors file cannot contain all features under the names of the recordings.

    The format reserves `__metadata__`, and names that are not UTF-8 may become equal when they are escaped.
    """
    used = {"__metadata__"}
    for base in bases if output.suffix == SINGLE else ():
        key = _key(base.with_name(f"{base.name}.npy"))
        if key in used:
            raise ConfigError(
                f"-o {output}: the name {key} is used twice or reserved in safetensors files; rename the "
                "recording, or give a folder"
            )
        used.add(key)


def save_array(array: Tensor, path: Path) -> None:
    """Write a tensor to a .npy file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        np.save(file, array.numpy())


def _header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _key(path: Path) -> str:
    """Return the name of a recording's tensor in the safetensors file. Names must be valid UTF-8."""
    return path.with_suffix("").as_posix().encode("utf-8", "backslashreplace").decode()
