"""Input readers for the table recipe: tables, corpus folders, and manifests from other toolkits.

All readers yield `Row` objects. A row with a problem becomes a `Rejected` that names the file and, except for
audio folders, the line. A problem with a whole file, such as an unknown type, raises a DataError.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from jahubert.audio.search import AUDIO_ENDINGS, find_audio
from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.formats.gzip_files import open_gzip
from jahubert.train.data.manifest import Rejected
from jahubert.train.data.utterances import is_file, is_folder, read_reliably

log = logging.getLogger(__name__)

# Accepted names for each column, in order of preference; case is ignored.
COLUMNS = {
    "path": ("path", "audio", "audio_path", "audio_filepath", "file", "wav"),
    "text": ("text", "sentence", "transcription", "transcript"),
    "kana": ("kana", "reading", "yomi"),
    "start": ("start", "begin", "offset"),
    "end": ("end", "stop"),
    "duration": ("duration",),
    "speaker": ("speaker", "speaker_id", "client_id", "spk"),
    "split": ("split", "subset", "set"),
    "id": ("id", "utt_id", "utterance_id"),
}
SPLITS = {
    "training": "train",
    "tr": "train",
    **dict.fromkeys(("validation", "valid", "val", "development", "devel"), "dev"),
    "eval": "test",
    "evaluation": "test",
}
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_UNDECODED = range(0xDC80, 0xDD00)  # characters that stand for bytes that are not UTF-8
_QUOTED_LINES = 20  # maximum number of lines of a row with line breaks in quotes
_MAX_LINE = 4 << 20  # maximum length of a line in bytes


@dataclass(frozen=True)
class Row:
    """A recording, or a part of one, as specified in the input."""

    where: str  # file:line, for error messages
    path: Path
    id: str = ""  # if empty, the id is derived from the path
    text: str = ""
    kana: str = ""
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None means the end of the file
    speaker: str = ""
    split: str = ""


def read_rows(data: Path, work: Path) -> Iterator[Row | Rejected]:
    """Read an input of any supported kind. Audio that a table contains is written to `work`.

    Raises:
        DataError: the input is not supported, or a whole file is unusable, for example because it is damaged
            or has no column with the audio.
    """
    if is_file(data):
        if not _is_cut_manifest(data):
            return read_table(data, work=work)
        reader = read_cuts
    elif is_file(data / "wav.scp"):
        reader = read_kaldi
    elif is_folder(data / "clips") and any(data.glob("*.tsv")):
        reader = read_common_voice
    elif any(data.glob("*/wav.scp")) or any(data.glob("raw/*/wav.scp")):
        reader = read_espnet
    elif is_folder(data):
        reader = partial(read_audio_folder, exclude=work)
    else:
        raise DataError(
            f"{data}: not found; set data= to a table ({', '.join(TABLES)}), a Common Voice release, a Kaldi "
            "data directory, an ESPnet dump, a lhotse cut manifest, or a folder of audio with .txt or .lab "
            "files"
        )
    return reader(data)


# --- tables -----------------------------------------------------------------------------------------------


def read_table(
    path: Path, folder: Path | None = None, split: str = "", work: Path | None = None
) -> Iterator[Row | Rejected]:
    """Read a csv, tsv, jsonl or parquet file. A .json file is read as jsonl.

    Args:
        path: the table.
        folder: folder against which relative audio paths are resolved (default: the folder of the table).
        split: split of the rows without one.
        work: folder for audio that the table contains.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise DataError(f"{path}: unknown file type; expected {', '.join(TABLES)}")
    records = {".parquet": _parquet_records, ".jsonl": _json_records, ".json": _json_records}.get(
        suffix, lambda path: _delimited_records(path, "\t" if suffix == ".tsv" else ",")
    )
    names: dict[str, str] | None = None
    for line, record in records(path):
        where = f"{path}:{line}"
        if isinstance(record, str):
            yield Rejected(where, "malformed line", f"{where}: {record}")
            continue
        if names is None or suffix in (".jsonl", ".json"):
            names = _column_names(record)
        if "path" not in names:
            found = ", ".join(map(str, record)) or "no columns"
            expected = f"expected one of {', '.join(COLUMNS['path'])}, found {found}"
            problem = f"{where}: no column with the audio; {expected}"
            if suffix not in (".jsonl", ".json"):
                raise DataError(problem)
            yield Rejected(where, "no audio path", problem)
            continue
        audio = record.get(names["path"])
        content = audio.get("bytes") if isinstance(audio, Mapping) else None
        if isinstance(content, bytes) and content and work is not None:
            audio_path = _extract(audio, work / "audio" / path.stem, line)
            record = {**record, names["path"]: audio_path}
        yield _row(record, names, where, folder or path.parent, split)


def _extract(audio: Mapping[str, Any], folder: Path, row: int) -> Path:
    """Write the audio in a row of a Hugging Face dataset to a file, unless it exists with the same size."""
    name = Path(str(audio.get("path") or "audio")).name[-60:]
    path = folder.absolute() / f"{row:07d}-{name}"
    if not path.is_file() or path.stat().st_size != len(audio["bytes"]):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            file.write(audio["bytes"])
    return path


def _column_names(record: Mapping[str, Any]) -> dict[str, str]:
    """Map each known column to its name in a record."""
    lower = {str(name).strip().lower(): name for name in record if name is not None}
    return {
        column: next(lower[name] for name in accepted if name in lower)
        for column, accepted in COLUMNS.items()
        if any(name in lower for name in accepted)
    }


def _row(
    record: Mapping[str, Any], names: Mapping[str, str], where: str, folder: Path, split: str
) -> Row | Rejected:
    def cell(column: str) -> str:
        value = record.get(names[column]) if column in names else None
        if isinstance(value, Mapping):  # this is the audio struct of Hugging Face datasets
            value = value.get("path")
        return "" if value is None else str(value).strip()

    for column, name in names.items():
        value = record.get(name)
        if isinstance(value, (list, bytes)) or (isinstance(value, Mapping) and column != "path"):
            problem = f"{where}: {name} must be text or a number; found {type(value).__name__}"
            return Rejected(where, "malformed line", problem)
        if not cell(column).isprintable() and not _is_unicode(cell(column)):
            return Rejected(where, "malformed line", f"{where}: {name} is not Unicode text")
    if not cell("path"):
        return Rejected(where, "no audio path", where)
    try:
        start = _seconds(cell("start") or "0")
        end = _seconds(cell("end")) if cell("end") else None
        if end is None and cell("duration") and cell("start"):
            end = start + _seconds(cell("duration"))
    except ValueError as error:
        return Rejected(where, "invalid time", f"{where}: {error}")
    return Row(
        where,
        folder / cell("path"),
        id=cell("id"),
        text=cell("text"),
        kana=cell("kana"),
        start=start,
        end=end,
        speaker=cell("speaker"),
        split=cell("split") or split,
    )


def _seconds(value: str | float) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"not a finite time: {value}")
    return seconds


def _is_unicode(text: str) -> bool:
    """Return whether a text contains no surrogates, which cannot be encoded as UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


_Records = Iterator[tuple[int, "Mapping[str, Any] | str"]]


def _delimited_records(path: Path, delimiter: str) -> _Records:
    """Yield the number of the last line of each row, and its fields by column or a problem."""
    lines = _read_lines(path)
    ahead: deque[tuple[int, str]] = deque()  # lines that have been read to complete a quoted field
    header: list[str] | None = None
    while _peek(lines, ahead, 1):
        number, line = ahead.popleft()
        if not line.strip():
            continue
        fields, problem = _split_fields(line, delimiter)
        # A quoted field may contain line breaks. If a quote is never closed, only its line is rejected.
        for n_more in range(1, _QUOTED_LINES):
            if fields is not None or not problem.startswith("unexpected end") or delimiter == "\t":
                break
            following = _peek(lines, ahead, n_more)
            fields, further = _split_fields("\n".join((line, *following)), delimiter)
            if fields is not None:
                number += n_more
                for _ in following:
                    ahead.popleft()
            elif not further.startswith("unexpected end"):
                break
        if fields is None:
            yield number, problem
        elif header is None:
            header = [name.strip() for name in fields]
            if duplicates := sorted({name for name in header if name and header.count(name) > 1}):
                raise DataError(f"{path}:{number}: duplicate columns: {', '.join(duplicates)}")
        elif len(fields) != len(header):
            yield number, f"the number of fields is {len(fields)}, but the header has {len(header)}"
        else:
            yield number, dict(zip(header, fields, strict=True))


def _peek(lines: Iterator[tuple[int, str]], ahead: deque[tuple[int, str]], n: int) -> list[str]:
    """Return the next `n` lines, or fewer at the end, and keep them in `ahead`."""
    ahead.extend(islice(lines, max(0, n - len(ahead))))
    return [text for _, text in islice(ahead, n)]


def _split_fields(line: str, delimiter: str) -> tuple[list[str] | None, str]:
    """Return the fields of a row, or None and the problem."""
    if problem := _encoding_problem(line):
        return None, problem
    if delimiter == "\t":  # quotes have no meaning in Common Voice and similar tables
        return line.split("\t"), ""
    try:
        return next(csv.reader([line], strict=True)), ""
    except csv.Error as error:
        return None, str(error)


def _json_records(path: Path) -> _Records:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        if problem := _encoding_problem(line):
            yield number, problem
            continue
        if number == 1 and re.fullmatch(r"\[\s*(\{.*)?", line.strip()):
            raise DataError(
                f"{path}:{number}: the file has a list of objects, but one object per line is expected; "
                "convert it with: jq -c '.[]'"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"invalid JSON ({error})"
            continue
        yield number, record if isinstance(record, dict) else "not a JSON object"


def _parquet_records(path: Path) -> _Records:
    from jahubert.train.data.parquet import parquet_batches

    number = 0
    for batch in parquet_batches(path):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file, which may have a byte order mark or be gzip-compressed.

    Bytes that are not UTF-8 become characters in the range `_UNDECODED`.

    Raises:
        DataError: the file is UTF-16, a damaged gzip file, or one that decompresses to an excessive size; or
            a line is too long.
    """
    file = io.BytesIO(read_reliably(path.read_bytes, path))
    lines = open_gzip(file, path) if path.suffix == ".gz" else file
    try:
        for number, raw in enumerate(iter(partial(lines.readline, _MAX_LINE), b""), 1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path}:1: not UTF-8; convert a UTF-16 file with: iconv -f UTF-16 -t UTF-8")
            if len(raw) == _MAX_LINE:
                raise DataError(
                    f"{path}:{number}: the line does not end within {_MAX_LINE} bytes; check that the file "
                    "is a text file"
                )
            text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            yield number, text.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy the file again") from error


def _encoding_problem(line: str) -> str:
    """Return the problem if a line contains bytes that are not UTF-8, otherwise ""."""
    if line.isprintable() or not any(ord(char) in _UNDECODED for char in line):
        return ""
    return "not UTF-8; convert a Shift_JIS file with: iconv -f CP932 -t UTF-8"


# --- corpora and other toolkits -----------------------------------------------------------------------------


def read_common_voice(folder: Path) -> Iterator[Row | Rejected]:
    """Read a Common Voice release: clips/ and train.tsv, dev.tsv and test.tsv, or validated.tsv."""
    tables = [folder / f"{split}.tsv" for split in ("train", "dev", "test")]
    tables = [path for path in tables if is_file(path)]
    for path in tables or sorted(folder.glob("validated.tsv")):
        split = "" if path.stem == "validated" else path.stem
        yield from read_table(path, folder / "clips", split)


def read_kaldi(folder: Path, split: str = "") -> Iterator[Row | Rejected]:
    """Read a Kaldi data directory: wav.scp with plain paths, and optionally segments, text and utt2spk."""
    names = ("wav.scp", "segments", "text", "utt2spk")
    wav, segments, text, speaker = (_KaldiTable(folder / name) for name in names)
    for table in (wav, segments, text, speaker):
        yield from table.rejected
    is_segmented = is_file(segments.path)
    for id, (line, value) in (segments if is_segmented else wav).lines.items():
        where = f"{(segments if is_segmented else wav).path}:{line}"
        recording, _, times = value.partition(" ") if is_segmented else (id, "", "")
        if recording not in wav.lines:
            yield Rejected(id, "recording not in wav.scp", where)
            continue
        audio = wav.lines[recording][1]
        if id in text.broken or id in speaker.broken:
            continue  # reported above
        if audio.endswith("|"):
            yield Rejected(id, "wav.scp has a command instead of a path", f"{where}: {audio[:80]}")
        elif ".ark:" in audio:
            yield Rejected(id, "wav.scp has a Kaldi archive instead of a path", f"{where}: {audio[:80]}")
        else:
            record = {"path": audio, "id": id, "text": text.get(id), "speaker": speaker.get(id)}
            if is_segmented:
                record["start"], end = [*times.split(), "?", "?"][:2]
                # An end of -1 is that of the recording.
                record["end"] = None if re.fullmatch(r"-1(\.0*)?", end) else end
            # Kaldi resolves paths from the working directory. Paths relative to the folder are also accepted.
            base = Path() if is_file(audio) else folder
            yield _row(record, {name: name for name in record}, where, base, split)
    for id in sorted(text.lines.keys() - (segments if is_segmented else wav).lines.keys()):
        yield Rejected(id, "text without audio", f"{text.path}:{text.lines[id][0]}")


class _KaldiTable:
    """A file of a Kaldi data directory; a missing file has no lines.

    Attributes:
        lines: number and value of each line, by key.
        broken: keys of the rejected lines.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[str, tuple[int, str]] = {}
        self.broken: set[str] = set()
        self.rejected: list[Rejected] = []
        for number, line in _read_lines(path) if is_file(path) else ():
            key, _, value = line.strip().replace("\t", " ").partition(" ")
            if not key:
                continue
            reason, detail = "malformed line", _encoding_problem(line)
            if not detail and key in self.lines:
                reason, detail = "duplicate id", f"{quote(key)} already occurs in line {self.lines[key][0]}"
            if detail:
                self.broken.add(key)
                shown = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                self.rejected.append(Rejected(shown, reason, f"{path}:{number}: {detail}"))
            else:
                self.lines[key] = (number, value.strip())

    def get(self, key: str) -> str:
        return self.lines.get(key, (0, ""))[1]


def read_espnet(folder: Path) -> Iterator[Row | Rejected]:
    """Read an ESPnet dump: Kaldi data directories whose names determine the splits.

    See `_split_of_folder`. Folders that do not name a split are test sets.
    """
    root = folder / "raw" if any(folder.glob("raw/*/wav.scp")) else folder
    for scp in sorted(root.glob("*/wav.scp")):
        name = scp.parent.name
        yield from read_kaldi(scp.parent, _split_of_folder(name) or name)


def _split_of_folder(name: str) -> str:
    """Return the split that a folder is named after, or an empty string.

    train_nodup, train-clean-100 and tr_no_dev are training sets, dev_clean and train_dev development sets,
    and test_clean a test set of its own.
    """
    parts = [normalize_split(part) for part in re.split("[_-]", name)]
    if parts[0] == "test":
        return name if len(parts) > 1 else "test"
    if parts[0] not in ("train", "dev"):
        return ""
    return "dev" if "dev" in parts and "no" not in parts else "train"


def _is_cut_manifest(path: Path) -> bool:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return False
    first = next((line for _, line in _read_lines(path) if line.strip()), "")
    return '"recording"' in first and '"start"' in first


def read_cuts(path: Path) -> Iterator[Row | Rejected]:
    """Read a lhotse cut manifest with at most one supervision per cut and audio in files."""
    for number, record in _json_records(path):
        where = f"{path}:{number}"
        if isinstance(record, str):
            yield Rejected(where, "malformed line", f"{where}: {record}")
            continue
        try:
            yield _cut_row(record, where, path.parent)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            detail = f"{where}: not a lhotse cut ({type(error).__name__}: {error})"
            yield Rejected(where, "malformed line", detail)


def _cut_row(record: Mapping[str, Any], where: str, folder: Path) -> Row | Rejected:
    """Convert a lhotse cut, which may lack any field or have fields of other types."""
    supervisions = record.get("supervisions") or [{}]
    recording = record.get("recording") or {}
    sources = recording.get("sources") or []
    if len(supervisions) > 1 or len(sources) != 1 or sources[0].get("type") != "file":
        reason = "cut with several supervisions, or with audio that is not one file"
        return Rejected(str(record.get("id", where)), reason, where)
    if recording.get("transforms"):
        return Rejected(str(record.get("id", where)), "cut with audio transforms", where)
    n_channels = len(sources[0].get("channels") or [0])
    if n_channels > 1 and isinstance(record.get("channel", 0), int):
        reason = "cut of one channel of a recording with several"
        return Rejected(str(record.get("id", where)), reason, f"{where}: channels: {n_channels}")
    start, duration = _seconds(record.get("start", 0)), _seconds(record["duration"])
    end = start + duration
    if "start" in supervisions[0]:  # relative to the start of the cut
        first = start + _seconds(supervisions[0]["start"])
        start, end = max(start, first), min(end, first + _seconds(supervisions[0]["duration"]))
    is_part = start > 0 or end < _seconds(recording.get("duration", duration)) - 1e-4
    row = {
        "path": sources[0]["source"],
        "id": record.get("id"),
        "text": supervisions[0].get("text"),
        "speaker": supervisions[0].get("speaker"),
        "start": start,
        "end": end if is_part else None,
        "split": (record.get("custom") or {}).get("split"),
    }
    return _row(row, {name: name for name in row}, where, folder, "")


def read_audio_folder(folder: Path, exclude: Path) -> Iterator[Row | Rejected]:
    """Read a folder of audio files with transcripts in .txt or .lab files.

    Subfolders that are named after a split (see `_split_of_folder`) are splits. All other subfolders of the
    folder or of a split are speakers. Files below `exclude`, where copies are written, are skipped.
    """
    paths, errors = find_audio(folder)
    paths = [path for path in paths if not path.absolute().is_relative_to(exclude.absolute())]
    if not paths:
        raise DataError(
            f"{folder}: no audio found; expected file name endings such as {', '.join(AUDIO_ENDINGS[:4])}"
        )
    for error in errors:
        yield Rejected(os.fsdecode(error.filename), "unreadable folder", str(error))
    depths = [path.relative_to(folder).parts for path in paths]
    if len({parts[0] for parts in depths}) == 1 and any(len(parts) > 2 for parts in depths):
        log.warning(
            "table: all recordings are in the folder %s, which is taken for their speaker; if its subfolders "
            "are speakers, set data= to this folder",
            folder / depths[0][0],
        )
    for path in paths:
        transcripts = [path.with_suffix(suffix) for suffix in (".txt", ".lab")]
        transcript = next((candidate for candidate in transcripts if is_file(candidate)), None)
        lines = [line for _, line in _read_lines(transcript)] if transcript else []
        if problem := _encoding_problem("".join(lines)):
            yield Rejected(str(path), "malformed line", f"{transcript}: {problem}")
            continue
        if transcript and transcript.suffix == ".lab" and _are_timed_labels(lines):
            yield Rejected(str(path), "labels with times instead of a transcript", str(transcript))
            continue
        text = " ".join(" ".join(lines).split())
        folders = path.parent.relative_to(folder).parts
        if split := _split_of_folder(folders[0]) if folders else "":
            folders = folders[1:]
        yield Row(str(path), path, text=text, speaker=folders[0] if folders else "", split=split)


def _are_timed_labels(lines: list[str]) -> bool:
    """Return whether the lines have times and labels, each from the end of the previous one (HTS, Julius)."""
    fields = [line.split(maxsplit=2) for line in lines if line.strip()]
    try:
        times = [(float(start), float(end)) for start, end, _ in fields]
    except ValueError:  # fewer fields, or no numbers
        return False
    is_ordered = all(start <= end for start, end in times)
    return len(times) > 1 and is_ordered and all(a[1] <= b[0] for a, b in pairwise(times))


def normalize_split(split: str) -> str:
    """Lowercase the name of a split and replace common synonyms with train, dev and test."""
    return SPLITS.get(split.lower(), split.lower())


def unique_ids(rows: Iterable[Row], root: Path) -> Callable[[Row], str]:
    """Create a function that returns the id of a row.

    The id of a row that has none is the file name without its ending. If these names are not unique, the id
    is the path without the ending, relative to `root` if the file is below it, followed by the times if the
    row has an end time.
    """
    rows = list(rows)
    stems = [row.path.stem for row in rows if not row.id]
    by_stem = len(set(stems)) == len(stems)

    def id_of(row: Row) -> str:
        if row.id:
            return row.id
        if by_stem:
            return row.path.stem
        inside = row.path.is_relative_to(root)
        name = str((row.path.relative_to(root) if inside else row.path).with_suffix(""))
        return (
            name if row.end is None else f"{name}_{round(row.start * 1000):07d}_{round(row.end * 1000):07d}"
        )

    return id_of
