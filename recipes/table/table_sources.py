"""Input readers for recipe table: tables, corpus folders, and manifests from other toolkits.

All readers yield `Row` objects. A row with a problem becomes a `Rejected` that names the file and line. A
problem with a whole file, such as a missing column, raises a DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_write
from jahubert.train.data.manifest import Rejected
from jahubert.train.data.utterances import read_reliably

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
SPLITS = {"validation": "dev", "valid": "dev", "val": "dev", "eval": "test", "training": "train"}
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".aac")


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
    """Read an input of any supported kind, writing audio inside a table to `work`.

    Raises:
        DataError: the input is not supported, a column is missing, or a file is not UTF-8.
    """
    if data.is_file():
        if not _is_cut_manifest(data):
            return read_table(data, work=work)
        reader = read_cuts
    elif (data / "wav.scp").is_file():
        reader = read_kaldi
    elif (data / "clips").is_dir() and any(data.glob("*.tsv")):
        reader = read_common_voice
    elif any(data.glob("*/wav.scp")) or any(data.glob("raw/*/wav.scp")):
        reader = read_espnet
    elif data.is_dir():
        reader = read_audio_folder
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
    """Read a csv, tsv, jsonl or parquet file. Relative audio paths are resolved against `folder`."""
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
        if names is None or suffix not in (".csv", ".tsv", ".parquet"):
            names = _column_names(record, where)
        audio = record.get(names["path"])
        if isinstance(audio, Mapping) and audio.get("bytes") and work is not None:
            audio_path = _extract(audio, work / "audio" / path.stem, line)
            record = {**record, names["path"]: audio_path}
        yield _row(record, names, where, folder or path.parent, split)


def _extract(audio: Mapping[str, Any], folder: Path, row: int) -> Path:
    """Write the audio in a row of a Hugging Face dataset to a file, unless the file exists."""
    name = Path(audio.get("path") or "audio").name
    path = folder.absolute() / f"{row:07d}-{name}"
    if not path.is_file() or path.stat().st_size != len(audio["bytes"]):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            file.write(audio["bytes"])
    return path


def _column_names(record: Mapping[str, Any], where: str) -> dict[str, str]:
    lower = {str(name).strip().lower(): name for name in record if name is not None}
    names = {
        column: next(lower[name] for name in accepted if name in lower)
        for column, accepted in COLUMNS.items()
        if any(name in lower for name in accepted)
    }
    if "path" not in names:
        raise DataError(
            f"{where}: no column with the audio; expected one of {', '.join(COLUMNS['path'])}, found "
            f"{', '.join(map(str, record))}"
        )
    return names


def _row(
    record: Mapping[str, Any], names: Mapping[str, str], where: str, folder: Path, split: str
) -> Row | Rejected:
    def cell(column: str) -> str:
        value = record.get(names[column]) if column in names else None
        if isinstance(value, Mapping):  # this is the audio struct of Hugging Face datasets
            value = value.get("path")
        return "" if value is None else str(value).strip()

    if not cell("path"):
        return Rejected(where, "no audio path", where)
    try:
        start = float(cell("start") or 0)
        end = float(cell("end")) if cell("end") else None
        if end is None and cell("duration") and cell("start"):
            end = start + float(cell("duration"))
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


_Records = Iterator[tuple[int, "Mapping[str, Any] | str"]]


def _delimited_records(path: Path, delimiter: str) -> _Records:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(_read_text(path)), delimiter=delimiter, quoting=quoting)
    for record in reader:
        if None in record:
            yield (
                reader.line_num,
                f"more fields than the {len(reader.fieldnames or ())} columns in the header",
            )
        else:
            yield reader.line_num, record


def _json_records(path: Path) -> _Records:
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
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


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, which may have a byte order mark or be compressed with gzip."""
    raw = read_reliably(path.read_bytes, path)
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8; convert a Shift_JIS file with: iconv -f CP932 -t UTF-8"
        ) from error


# --- corpora and other toolkits -----------------------------------------------------------------------------


def read_common_voice(folder: Path) -> Iterator[Row | Rejected]:
    """Read a Common Voice release: clips/ and train.tsv, dev.tsv and test.tsv, or validated.tsv."""
    tables = [folder / f"{split}.tsv" for split in ("train", "dev", "test")]
    tables = [path for path in tables if path.is_file()]
    for path in tables or sorted(folder.glob("validated.tsv")):
        split = "" if path.stem == "validated" else path.stem
        yield from read_table(path, folder / "clips", split)


def read_kaldi(folder: Path, split: str = "") -> Iterator[Row | Rejected]:
    """Read a Kaldi data directory: wav.scp with plain paths, and optionally segments, text and utt2spk."""
    recordings = dict(_kaldi_lines(folder / "wav.scp"))
    text, speakers = (
        {key: value for key, (_, value) in _kaldi_lines(folder / name)} for name in ("text", "utt2spk")
    )
    if (folder / "segments").is_file():
        utterances = _kaldi_segments(folder, recordings)
    else:
        utterances = ((id, line, value, "") for id, (line, value) in recordings.items())
    for id, line, audio, times in utterances:
        where = f"{folder / ('segments' if times else 'wav.scp')}:{line}"
        if not audio:
            yield Rejected(id, "recording not in wav.scp", where)
        elif audio.endswith("|"):
            yield Rejected(id, "wav.scp has a command instead of a path", f"{where}: {audio[:80]}")
        elif ".ark:" in audio:
            yield Rejected(id, "wav.scp has a Kaldi archive instead of a path", f"{where}: {audio[:80]}")
        else:
            record = {"path": audio, "id": id, "text": text.get(id, ""), "speaker": speakers.get(id, "")}
            if times:
                record["start"], _, record["end"] = times.partition(" ")
            # Kaldi resolves paths against the working directory. Paths relative to the folder are accepted,
            # too.
            base = Path() if Path(audio).exists() else folder
            yield _row(record, {name: name for name in record}, where, base, split)


def _kaldi_segments(
    folder: Path, recordings: Mapping[str, tuple[int, str]]
) -> Iterator[tuple[str, int, str, str]]:
    for id, (line, value) in _kaldi_lines(folder / "segments"):
        recording, _, times = value.partition(" ")
        yield id, line, recordings.get(recording, (0, ""))[1], " ".join(times.split()) or "? ?"


def _kaldi_lines(path: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    if path.is_file():
        for number, line in enumerate(_read_text(path).splitlines(), 1):
            key, *value = line.split(maxsplit=1)
            yield key, (number, value[0].strip() if value else "")


def read_espnet(folder: Path) -> Iterator[Row | Rejected]:
    """Read an ESPnet dump: Kaldi data directories whose names are the splits (train, dev, test, ...)."""
    root = folder / "raw" if any(folder.glob("raw/*/wav.scp")) else folder
    for scp in sorted(root.glob("*/wav.scp")):
        yield from read_kaldi(scp.parent, scp.parent.name)


def _is_cut_manifest(path: Path) -> bool:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return False
    first = _read_text(path).lstrip().partition("\n")[0]
    return '"recording"' in first and '"start"' in first


def read_cuts(path: Path) -> Iterator[Row | Rejected]:
    """Read a lhotse cut manifest with one supervision per cut and audio in files."""
    for number, record in _json_records(path):
        where = f"{path}:{number}"
        if isinstance(record, str):
            yield Rejected(where, "malformed line", f"{where}: {record}")
            continue
        supervisions = record.get("supervisions") or [{}]
        sources = record.get("recording", {}).get("sources", [])
        if len(supervisions) > 1 or len(sources) != 1 or sources[0].get("type") != "file":
            yield Rejected(str(record.get("id", where)), "cut without a single file and supervision", where)
            continue
        start, duration = float(record.get("start", 0)), float(record.get("duration", 0))
        is_part = start > 0 or duration < float(record["recording"].get("duration", duration)) - 1e-4
        row = {
            "path": sources[0]["source"],
            "id": record.get("id"),
            "text": supervisions[0].get("text"),
            "speaker": supervisions[0].get("speaker"),
            "start": start,
            "end": start + duration if is_part else None,
            "split": (record.get("custom") or {}).get("split"),
        }
        yield _row(row, {name: name for name in row}, where, path.parent, "")


def read_audio_folder(folder: Path) -> Iterator[Row | Rejected]:
    """Read a folder of audio files with transcripts in .txt or .lab files. Each subfolder is a speaker."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
    if not paths:
        raise DataError(f"{folder}: no audio found; expected files such as {', '.join(AUDIO[:4])}")
    for path in paths:
        transcripts = [path.with_suffix(suffix) for suffix in (".txt", ".lab")]
        transcript = next((candidate for candidate in transcripts if candidate.is_file()), None)
        text = " ".join(_read_text(transcript).split()) if transcript else ""
        speaker = path.parent.name if path.parent != folder else ""
        yield Row(str(path), path, text=text, speaker=speaker)


def normalize_split(split: str) -> str:
    """Lowercase the name of a split and replace common synonyms with train, dev and test."""
    return SPLITS.get(split.lower(), split.lower())


def unique_ids(rows: Iterable[Row], root: Path) -> Callable[[Row], str]:
    """Create a function that returns the id of a row.

    The id of a row that has none is the file name, or the relative path if file names are not unique.
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
