"""Tests of malformed tables: one malformed row is rejected with its file and line, and many end the run.

Most tests damage a corpus of 20 recordings in one place. Damage to one row must reject that row, and damage
to the whole input must end the stage with a one-sentence error message that names the file.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from jahubert.errors import DataError
from jahubert.limits import GZIP_BYTES, VARIABLE
from jahubert.train.data.manifest import Manifest
from jahubert.train.stages import prepare as stage

RATE, N = 16_000, 20
NAMES = [f"u{i:02d}" for i in range(N)]


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "audio").mkdir()
    for number, name in enumerate(NAMES):
        noise = 0.1 * np.random.default_rng(number).standard_normal(8000 + number)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", noise, RATE)
    return tmp_path


def prepared(data: Path, **options) -> tuple[set[str], list[dict]]:
    """Run stage=prepare, and return the ids of the utterances and the rejected rows."""
    out = data.parent / "out"
    out.mkdir(exist_ok=True)
    options = {"max_rejected": 0.2, **options}
    stage.prepare(stage.Config(recipe="table", data=str(data), options=options), out)
    manifest = Manifest(out / "manifest.arrow")
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {manifest[i].id for i in range(len(manifest))}, [json.loads(line) for line in lines]


# --- tables -----------------------------------------------------------------------------------------------

HEADER = ["id", "path", "text", "start", "end", "speaker"]


def rows() -> list[list[str]]:
    return [
        [name, f"audio/{name}.wav", "今日は晴れ", "0", "0.5", f"s{i % 4}"] for i, name in enumerate(NAMES)
    ]


def write_csv(root: Path, lines: list[list[str]], raw: Callable[[bytes], bytes] = lambda b: b) -> Path:
    text = "".join(",".join(line) + "\n" for line in (HEADER, *lines))
    (root / "my.csv").write_bytes(raw(text.encode()))
    return root / "my.csv"


def changed(row: int, column: int, value: str) -> list[list[str]]:
    lines = rows()
    lines[row][column] = value
    return lines


CELLS = {
    "missing file": (1, "audio/none.wav"),
    "folder as file": (1, "audio"),
    "name too long": (1, "x" * 300),
    "name with NUL": (1, "a\0b.wav"),
    "no path": (1, ""),
    "id used twice": (0, "u00"),
    "negative start": (3, "-1"),
    "start is not a number": (3, "eins"),
    "start is NaN": (3, "nan"),
    "end is infinite": (4, "inf"),
    "end before start": (4, "0"),
    "end after the audio": (4, "7"),
    "start after the audio": (3, "0.9"),
    "unclosed quote": (2, '"今日'),
    "text after a quote": (2, '"今"日'),
    "too many fields": (5, "s1,s2"),
}


@pytest.mark.parametrize("name", CELLS)
def test_malformed_cell_rejects_its_row(root, name):
    column, value = CELLS[name]
    if name == "start after the audio":
        value = "0.9"
    lines = changed(7, column, value)
    if name == "start after the audio":
        lines[7][4] = "1.5"
    ids, rejected = prepared(write_csv(root, lines))
    assert ids == {*NAMES} - {"u07"}
    assert len(rejected) == 1 and "my.csv:9" in rejected[0]["detail"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_truncated_row_is_rejected(root, suffix):
    text = "".join((",\t"[suffix == ".tsv"]).join(line) + "\n" for line in (HEADER, *rows()))
    data = root / f"my{suffix}"
    data.write_text(text[: text.rindex("u19") + 8], encoding="utf-8")
    ids, rejected = prepared(data)
    assert ids == {*NAMES} - {"u19"} and f"my{suffix}:21" in rejected[0]["detail"]


def test_bytes_that_are_not_utf8_reject_their_row(root):
    data = write_csv(root, rows(), lambda raw: raw.replace("晴れ".encode(), b"\x90\xb0\x82\xea", 1))
    ids, rejected = prepared(data)
    assert ids == {*NAMES} - {"u00"} and "my.csv:2" in rejected[0]["detail"]


def test_line_breaks_in_quotes_and_unicode_separators_do_not_end_a_row(root):
    lines = changed(3, 2, '"今日は\n晴れ"')
    lines[4][2] = "今日\u2028は\x85晴れ"
    ids, rejected = prepared(write_csv(root, lines))
    assert ids == {*NAMES} and not rejected


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (lambda raw: raw.decode().encode("cp932"), "my.csv:2: not UTF-8"),
        (lambda raw: raw.decode().encode("utf-16"), "UTF-16"),
        (lambda raw: b"", "no rows"),
        (lambda raw: raw.partition(b"\n")[0], "no rows"),
        (lambda raw: raw.replace(b"path", b"datei"), "no column with the audio"),
        (lambda raw: raw.replace(b"speaker", b"text", 1), "duplicate columns"),
        (lambda raw: raw.replace(b"audio/", b"wrong/"), "audio file not found: 20"),
        (lambda raw: raw.replace(b"audio/u0", b"wrong/u0"), "audio file not found: 10.*max_rejected"),
        (lambda raw: os.urandom(5000), "my.csv"),
    ],
)
def test_malformed_csv_ends_the_run_with_one_sentence(root, raw, problem):
    with pytest.raises(DataError, match=problem) as error:
        prepared(write_csv(root, rows(), raw))
    assert "my.csv" in str(error.value) and "\n" not in str(error.value)


def test_many_malformed_rows_are_left_out_on_request(root):
    data = write_csv(root, rows(), lambda raw: raw.replace(b"audio/u0", b"wrong/u0"))
    ids, rejected = prepared(data, max_rejected=0.6)
    assert len(ids) == 10 and len(rejected) == 10
    with pytest.raises(DataError, match="audio file not found: 1"):
        prepared(write_csv(root, changed(7, 1, "none.wav")), max_rejected=0.0)


def json_records() -> list[dict]:
    return [dict(zip(HEADER, row, strict=True)) for row in rows()]


RECORDS: dict[str, Callable[[dict], str]] = {
    "truncated": lambda r: json.dumps(r)[:-9],
    "empty object": lambda r: "{}",
    "no path": lambda r: json.dumps({k: v for k, v in r.items() if k != "path"}),
    "null path": lambda r: json.dumps(r | {"path": None}),
    "not an object": lambda r: json.dumps(list(r.values())),
    "deeply nested": lambda r: "[" * 100_000,
    "text is a list": lambda r: json.dumps(r | {"text": ["今日"]}),
    "speaker is an object": lambda r: json.dumps(r | {"speaker": {"name": "s"}}),
    "time is an object": lambda r: json.dumps(r | {"start": {}}),
    "time is NaN": lambda r: json.dumps(r | {"start": float("nan")}),
    "time is huge": lambda r: json.dumps(r | {"end": 1e300}),
    "half a surrogate pair": lambda r: json.dumps(r | {"text": "\ud800"}),
    "id used twice": lambda r: json.dumps(r | {"id": "u00"}),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("row", [0, 7])
def test_malformed_record_rejects_its_line(root, name, row):
    lines = [json.dumps(record, ensure_ascii=False) for record in json_records()]
    lines[row] = RECORDS[name](json_records()[row])
    (root / "my.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids, rejected = prepared(root / "my.jsonl")
    if name == "id used twice" and row == 0:
        assert not rejected
        return
    assert ids == {*NAMES} - {NAMES[row]}
    assert len(rejected) == 1 and f"my.jsonl:{row + 1}" in rejected[0]["detail"]


def test_records_without_audio_end_the_run(root):
    (root / "my.jsonl").write_text('{"text": "今日"}\n' * 5, encoding="utf-8")
    with pytest.raises(DataError, match="no audio path: 5"):
        prepared(root / "my.jsonl")


@pytest.mark.parametrize(
    "audio",
    [
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"RIFF", "path": "a" * 300 + ".wav"},
        {"bytes": b"RIFF", "path": "/"},
        None,
    ],
)
def test_malformed_audio_in_parquet_rejects_its_row(root, audio):
    content = [(root / "audio" / f"{name}.wav").read_bytes() for name in NAMES]
    table = [
        {"audio": {"bytes": raw, "path": f"{name}.wav"}, "text": "今日", "id": name}
        for raw, name in zip(content, NAMES, strict=True)
    ]
    table[7]["audio"] = audio
    pq.write_table(pa.Table.from_pylist(table), root / "my.parquet")
    ids, rejected = prepared(root / "my.parquet")
    assert ids == {*NAMES} - {"u07"} and len(rejected) == 1 and "my.parquet:8" in rejected[0]["detail"]


@pytest.mark.parametrize("damage", ["truncated", "no footer", "text"])
def test_damaged_parquet_ends_the_run_with_one_sentence(root, damage):
    pq.write_table(pa.Table.from_pylist(json_records()), root / "my.parquet")
    raw = (root / "my.parquet").read_bytes()
    raw = {"truncated": raw[:-40], "no footer": raw[:100], "text": b"path\na.wav\n"}[damage]
    (root / "my.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"my\.parquet"):
        prepared(root / "my.parquet")


# --- audio ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["empty", "header only", "text", "one sample", "broken link", "looping link"]
)
def test_unusable_audio_rejects_its_row(root, damage):
    path = root / "audio" / "u07.wav"
    raw = path.read_bytes()
    path.unlink()
    if damage == "one sample":
        soundfile.write(path, np.zeros(1), RATE)
    elif "link" in damage:
        path.symlink_to("none.wav" if damage == "broken link" else "u07.wav")
    else:
        path.write_bytes({"empty": b"", "header only": raw[:44], "text": b"hello"}[damage])
    lines = [[*row[:3], "", "", row[5]] for row in rows()]
    ids, rejected = prepared(write_csv(root, lines))
    assert ids == {*NAMES} - {"u07"} and len(rejected) == 1
    assert "my.csv:9" in rejected[0]["detail"] or "u07.wav" in rejected[0]["detail"]


# --- Kaldi data directories, lhotse manifests and folders -------------------------------------------------


def kaldi(root: Path) -> dict[str, list[str]]:
    return {
        "wav.scp": [f"r{name} {root / 'audio' / name}.wav" for name in NAMES],
        "segments": [f"{name} r{name} 0.00 0.50" for name in NAMES],
        "text": [f"{name} 今日は晴れ" for name in NAMES],
        "utt2spk": [f"{name} s{i % 4}" for i, name in enumerate(NAMES)],
    }


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("wav.scp", "ru07"),
        ("wav.scp", "other a.wav"),
        ("segments", "u07"),
        ("segments", "u07 ru07"),
        ("segments", "u07 ru07 0.5"),
        ("segments", "u07 ru07 0.5 0.1"),
        ("segments", "u07 ru07 x y"),
        ("segments", "u07 none 0 0.5"),
        ("segments", "u00 ru07 0 0.5"),
        ("text", "u00 二度"),
        ("text", b"u07 \x8d\xa1\x93\xfa"),
        ("utt2spk", "u00 s9"),
    ],
)
def test_malformed_kaldi_line_costs_one_utterance(root, file, line):
    files = kaldi(root)
    (root / "kaldi").mkdir()
    for name, lines in files.items():
        raw = [text.encode() for text in lines]
        if name == file:
            raw[7] = line if isinstance(line, bytes) else line.encode()
        (root / "kaldi" / name).write_bytes(b"\n".join([*raw, b"", b""]))  # an empty line at the end
    ids, rejected = prepared(root / "kaldi")
    assert len({*NAMES} - ids) <= 1 and 1 <= len(rejected) <= 2
    assert all(f"{root}/kaldi/" in item["detail"] and ":8" in item["detail"] for item in rejected)


def cuts(root: Path) -> list[dict]:
    return [
        {
            "id": name, "start": 0.0, "duration": 0.5, "channel": 0, "type": "MonoCut",
            "supervisions": [{"id": name, "text": "今日", "speaker": "s"}],
            "recording": {
                "id": name, "sampling_rate": RATE, "duration": 0.5,
                "sources": [{"type": "file", "channels": [0], "source": str(root / "audio" / f"{name}.wav")}],
            },
        }
        for name in NAMES
    ]  # fmt: skip


CUTS: dict[str, Callable[[dict], object]] = {
    "not a cut": lambda cut: {"recording": 1, "start": 0},
    "no recording": lambda cut: {k: v for k, v in cut.items() if k != "recording"},
    "null recording": lambda cut: cut | {"recording": None},
    "sources are text": lambda cut: cut | {"recording": cut["recording"] | {"sources": "a.wav"}},
    "no source": lambda cut: cut | {"recording": cut["recording"] | {"sources": [{"type": "file"}]}},
    "command": lambda cut: cut | {"recording": cut["recording"] | {"sources": [{"type": "command"}]}},
    "start is text": lambda cut: cut | {"start": "x"},
    "no duration": lambda cut: {k: v for k, v in cut.items() if k != "duration"},
    "supervisions are text": lambda cut: cut | {"supervisions": "x"},
    "two supervisions": lambda cut: cut | {"supervisions": 2 * cut["supervisions"]},
    "custom is a list": lambda cut: cut | {"custom": [1]},
    "transforms": lambda cut: cut | {"recording": cut["recording"] | {"transforms": [{"name": "Speed"}]}},
    "mixed cut": lambda cut: {"id": cut["id"], "tracks": [cut], "type": "MixedCut"},
    "line break": lambda cut: None,
}


@pytest.mark.parametrize("name", CUTS)
def test_malformed_cut_rejects_its_line(root, name):
    lines = [json.dumps(cut, ensure_ascii=False) for cut in cuts(root)]
    lines[7] = lines[7][:50] if name == "line break" else json.dumps(CUTS[name](cuts(root)[7]))
    with gzip.open(root / "cuts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    ids, rejected = prepared(root / "cuts.jsonl.gz")
    assert ids == {*NAMES} - {"u07"} and len(rejected) == 1
    assert "cuts.jsonl.gz:8" in rejected[0]["detail"]


def test_damaged_gzip_ends_the_run_with_one_sentence(root):
    raw = gzip.compress("\n".join(json.dumps(cut) for cut in cuts(root)).encode())
    for content in (raw[:-20], b"text", raw[:200] + b"\0" * 50 + raw[250:]):
        (root / "cuts.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"cuts\.jsonl\.gz"):
            prepared(root / "cuts.jsonl.gz")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_devices_and_pipes_are_not_read(root):
    os.mkfifo(root / "audio" / "pipe")
    lines = rows()
    lines[7][1], lines[8][1] = "/dev/zero", "audio/pipe"
    ids, rejected = prepared(write_csv(root, lines))
    assert ids == {*NAMES} - {"u07", "u08"} and {row["id"] for row in rejected} == {"u07", "u08"}


def test_gzip_bomb_is_rejected(root):
    (root / "cuts.jsonl.gz").write_bytes(gzip.compress(b"\n" * (GZIP_BYTES + 1)))
    with pytest.raises(DataError, match=rf"cuts\.jsonl\.gz.*{VARIABLE}"):
        prepared(root / "cuts.jsonl.gz")


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.jsonl"])
def test_line_of_unlimited_length_is_rejected(root, name):
    (root / name).write_bytes(b"path\n" + b"x" * (5 << 20))
    with pytest.raises(DataError, match=rf"{name}:2"):
        prepared(root / name)


def test_malformed_transcript_in_a_folder_rejects_its_recording(root):
    for name in NAMES:
        (root / "audio" / f"{name}.txt").write_bytes("今日\n".encode("cp932" if name == "u07" else "utf-8"))
    (root / "audio" / "folder.wav").mkdir()
    for name in NAMES:
        (root / "audio" / f"._{name}.wav").write_bytes(b"metadata of macOS")
    ids, rejected = prepared(root / "audio")
    assert ids == {*NAMES} - {"u07"}
    assert sorted(Path(item["detail"].split(": ")[0]).name for item in rejected) == ["u07.txt"]


def test_common_voice_release_reports_missing_clips(root):
    (root / "cv" / "clips").mkdir(parents=True)
    for name in NAMES[:-1]:
        (root / "cv" / "clips" / f"{name}.wav").symlink_to(root / "audio" / f"{name}.wav")
    lines = ["client_id\tpath\tsentence", *(f's{i % 5}\t{name}.wav\t"今日' for i, name in enumerate(NAMES))]
    (root / "cv" / "validated.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids, rejected = prepared(root / "cv")
    assert ids == {*NAMES} - {"u19"} and "validated.tsv:21" in rejected[0]["detail"]
