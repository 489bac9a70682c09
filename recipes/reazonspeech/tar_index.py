"""Index of the recordings in tar shards, created from the tar headers without unpacking the shards.

The index of a shard is a JSON file (see `index_shards`), which is created again if the size or modification
time of the shard changes. Several machines with a shared file system can each index a part of the shards:

    python recipes/reazonspeech/tar_index.py corpus/data exp/reazonspeech/prepare/work/index --part 1/4

`stage=prepare` then uses these indices. Without arguments, this file runs as a worker process of
`index_shards` and reads the paths of its shards from standard input.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from jahubert.errors import AudioError, JahubertError
from jahubert.formats.atomic import atomic_write
from jahubert.prefetch import usable_cores
from jahubert.train.experiment.script_processes import ScriptProcess, run_job

VERSION = 1
_MAX_NAME = 1 << 20  # bytes; maximum length of an entry that contains a long name
_BLOCK = 512  # bytes; headers and contents in a tar file start at multiples of this
FLAC_HEAD = 26  # bytes from the start of a FLAC file to the end of the sample count
_RATE = 16_000
DAMAGED, TRUNCATED = "damaged shard", "truncated"  # reasons for rejection
_FILES = (b"0", b"\0", b"7")  # type flags of regular files
_PATH = re.compile(rb"(?:^|\n)\d+ path=([^\n]+)\n")


def index_shards(shards: Sequence[Path], folder: Path, processes: int) -> Iterator[dict[str, Any]]:
    """Yield the indices of all shards in order. Up to `processes` processes create those that are missing.

    An index has the columns `names`, `offsets` (bytes), `lengths` (bytes) and `n_samples` (16 kHz), with one
    row per recording, and a list `broken` with [name, reason, detail] of each unusable recording.

    Raises:
        DataError: a shard cannot be read.
        JahubertError: a process failed; the message contains its output.
        OSError: a shard does not exist, or an index cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending = [shard for shard in shards if _read_index(shard, folder) is None]
    n = max(1, min(processes, len(pending)))
    with ExitStack() as stack:
        workers = []
        for i in range(n if n > 1 else 0):
            job = [str(folder), [str(shard) for shard in pending[i::n]]]
            workers.append(stack.enter_context(ScriptProcess(Path(__file__), job)))
        worker_of = {shard: workers[i % n] for i, shard in enumerate(pending) if workers}
        for shard in shards:
            if shard in worker_of and (done := worker_of[shard].readline()) != shard.name:
                raise JahubertError(
                    f"{shard}: the process for this shard indexed {done or 'nothing'} instead"
                )
            index = _read_index(shard, folder)
            if index is None:
                index = index_shard(shard)
                _write_index(index, shard, folder)
            yield index


def _state(shard: Path) -> list[int]:
    """Return the index version, shard size and modification time. A change invalidates the index."""
    status = shard.stat()
    return [VERSION, status.st_size, status.st_mtime_ns]


def _read_index(shard: Path, folder: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((folder / f"{shard.stem}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("state") == _state(shard) else None


def _write_index(index: dict[str, Any], shard: Path, folder: Path) -> None:
    path = folder / f"{shard.stem}.json"
    with atomic_write(path, errors="backslashreplace") as file:
        file.write(json.dumps(index, ensure_ascii=False))  # json.dump does not use the C encoder


# --- one shard --------------------------------------------------------------------------------------------


def index_shard(shard: Path) -> dict[str, Any]:
    """Create the index of a shard, in the format described in `index_shards`.

    Raises:
        ReadError: the shard cannot be read after several attempts.
        OSError: the shard does not exist.
    """
    try:
        return _index_members(shard)
    except OSError:
        from jahubert.train.data.utterances import read_reliably  # imports torch, which is rarely needed

        return read_reliably(lambda: _index_members(shard), shard)


def _index_members(shard: Path) -> dict[str, Any]:
    names: list[str] = []
    columns: dict[str, list[int]] = {"offsets": [], "lengths": [], "n_samples": []}
    broken: list[list[str]] = []
    state = _state(shard)
    with open(shard, "rb", buffering=0) as file:
        for name, offset, length, head in _members(file, state[1], broken, shard.name):
            n_samples = _flac_samples(head)
            if not n_samples:
                n_samples, reason = measure(shard, offset, length)
                if reason:
                    broken.append([name, "unusable audio", reason])
                    continue
            names.append(name)
            columns["offsets"].append(offset)
            columns["lengths"].append(length)
            columns["n_samples"].append(n_samples)
    return {"state": state, "names": names, **columns, "broken": broken}


def _members(
    file: BinaryIO, size: int, broken: list[list[str]], shard: str
) -> Iterator[tuple[str, int, int, bytes]]:
    """Yield (name, offset, length, first bytes) of each file in a tar shard, with one read per header.

    Damage ends the iteration and is appended to `broken`.
    """
    position, long_name = 0, b""
    while position < size:
        file.seek(position)
        header = file.read(_BLOCK + FLAC_HEAD)
        if header[:_BLOCK].count(0) == _BLOCK:
            return  # a zero block ends the archive
        length, kind = _length(header[:_BLOCK]), header[156:157]
        is_name = kind in (b"L", b"x")  # the entry is the long name of the next file, in GNU or POSIX format
        if length is None or (is_name and length > _MAX_NAME):
            broken.append([shard, DAMAGED, f"no tar header at byte {position}; the rest is skipped"])
            return
        offset = position + _BLOCK
        position = offset + -(-length // _BLOCK) * _BLOCK
        if is_name:
            file.seek(offset)
            body = file.read(length)
            match = _PATH.search(body) if kind == b"x" else None
            long_name = match[1] if match else body.rstrip(b"\0") if kind == b"L" else b""
            continue
        name = (long_name or _name(header)).decode("utf-8", "backslashreplace").removeprefix("./")
        long_name = b""
        if kind not in _FILES:
            continue
        if offset + length > size:
            broken.append([name, TRUNCATED, f"{shard} ends inside this file, at byte {size}"])
            return
        yield name, offset, length, header[_BLOCK : _BLOCK + length]


def _length(header: bytes) -> int | None:
    """Return the length (bytes) of a file from its tar header, or None if the header is damaged."""
    try:
        checksum = int(header[148:156].rstrip(b"\0 "), 8)
        if len(header) < _BLOCK or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        digits = header[124:136]
        length = int.from_bytes(digits[1:], "big") if digits[0] & 0x80 else int(digits.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    return length if length >= 0 else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _flac_samples(head: bytes) -> int:
    """Read the number of samples from a FLAC header. Return 0 if it is unknown or the rate is not 16 kHz."""
    if len(head) < FLAC_HEAD or head[:4] != b"fLaC" or head[4] & 0x7F:
        return 0
    numbers = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, sample size 5, samples 36
    return numbers & (1 << 36) - 1 if numbers >> 44 == _RATE else 0


def measure(shard: Path, offset: int, length: int) -> tuple[int, str]:
    """Determine the length of audio that has no 16 kHz FLAC header, or one without the number of samples.

    Returns:
        The length in 16 kHz samples and "", or 0 and the reason if the audio is unusable.
    """
    from jahubert.audio import AudioSource, audio_length  # imported here, because it imports torch
    from jahubert.train.data.utterances import read_reliably

    source = AudioSource(str(shard), offset, length)
    try:
        return read_reliably(lambda: audio_length(source), source), ""
    except AudioError as error:
        return 0, str(error)


def main() -> None:
    """Run the script, which indexes a part of the shards in a folder."""
    parser = argparse.ArgumentParser(
        description="Index a part of the shards, e.g. on one of several machines."
    )
    parser.add_argument("shards", type=Path, help="folder with 000.tar ... fff.tar")
    parser.add_argument("index", type=Path, help="work/index of stage=prepare, on a shared file system")
    parser.add_argument("--part", default="1/1", help="part to index, e.g. 2/4 for the second of four parts")
    parser.add_argument(
        "--processes", type=int, default=usable_cores(), help="number of processes (default: one per core)"
    )
    args = parser.parse_args()
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.part)
    if part is None or int(part[1]) > int(part[2]):
        parser.error(f"--part {args.part}: expected a part such as 2/4, from 1/4 to 4/4")
    shards = sorted(args.shards.glob("*.tar"))[int(part[1]) - 1 :: int(part[2])]
    if not shards:
        parser.error(f"{args.shards}: no shards such as 000.tar in part {args.part}")
    rows = sum(len(index["names"]) for index in index_shards(shards, args.index, args.processes))
    print(f"{args.index}: indexed shards: {len(shards)}, recordings: {rows}")


def _run(job: list[Any]) -> Iterator[str]:
    folder, shards = job
    for shard in map(Path, shards):
        _write_index(index_shard(shard), shard, Path(folder))
        yield shard.name


if __name__ == "__main__" and len(sys.argv) > 1:
    main()
elif __name__ == "__main__":
    run_job(_run)
