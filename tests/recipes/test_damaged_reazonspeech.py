"""Tests of damaged copies of ReazonSpeech: other shards are unaffected, and missing recordings are reported.

Most tests change one file of a release of four shards, as tar or Parquet files. The run must then continue,
the recordings in the other shards must stay the same, and those in the damaged shard must be unchanged, or
missing and reported. There are two exceptions: a flipped bit may change the caption or length of one
recording without being detected, and a missing Parquet file cannot be detected.
"""

from __future__ import annotations

import builtins
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.damage import DAMAGES, flip_bit
from fixtures.reazonspeech_tree import TEXTS, Release

from jahubert.audio import load_audio
from jahubert.errors import AudioError, ConfigError, DataError, ReadError
from jahubert.train.data import parquet, utterances
from jahubert.train.data.manifest import Rejected
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.stages import prepare as stage

recipe = recipe_module("reazonspeech")
SHARDS, ROWS = 4, 12
FORMS = ("tar", "parquet")

Content = dict[str, tuple[int, str, bytes]]


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Path]:
    release = Release(tmp_path_factory.mktemp("release"), shards=SHARDS, rows=ROWS)
    return {"tar": release.write(), "parquet": release.write_parquet()}


@pytest.fixture(scope="module")
def intact(releases, tmp_path_factory) -> dict[str, Content]:
    return {form: prepared(data, tmp_path_factory.mktemp(form))[0] for form, data in releases.items()}


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    monkeypatch.setattr(utterances, "RETRY_DELAYS", (0.0,))


def prepared(data: Path, work: Path, **options) -> tuple[Content, list[Rejected]]:
    """Return the length, caption and samples of each intact recording, and the rejected items."""
    subset = "all" if any(data.glob("*.parquet")) else "tiny"
    config = recipe.Config(subset=subset, processes=1, dev=3, test=2, **options)
    items = list(recipe.prepare(data, work, config, 0))
    rejected = [item for item in items if isinstance(item, Rejected)]
    content: Content = {}
    for item in (row for rows in items if not isinstance(rows, Rejected) for row in rows):
        try:
            samples = load_audio(item.audio).numpy().tobytes()
        except AudioError as error:  # stage=prepare rejects this recording
            rejected.append(Rejected(item.id, "unusable audio", str(error)))
            continue
        assert item.id not in content
        content[item.id] = (item.n_samples, item.text, samples)
    return content, rejected


def shard_path(data: Path, form: str) -> Path:
    return data / "data" / "001.tar" if form == "tar" else data / "train-00001-of-00004.parquet"


def check(data: Path, work: Path, intact: Content, changes: int = 0) -> list[Rejected]:
    """Check that only recordings in the damaged shard are lost, and that they are reported; return reports.

    Args:
        changes: maximum number of recordings whose caption or length may differ.
    """
    found, rejected = prepared(data, work)
    lost = {id for id in intact if found.get(id) != intact[id]}
    changed = {id for id in found if id in lost or id not in intact}
    assert all("001" in id for id in lost)
    assert len(changed) <= changes, changed
    assert rejected or not lost - changed
    return rejected


FILES: dict[str, Callable[[bytes], bytes]] = {
    **DAMAGES,
    "end of a member": lambda raw: raw[: len(raw) // 2 // 512 * 512],
    "zeros at the start": lambda raw: bytes(len(raw) // 2) + raw[len(raw) // 2 :],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", FILES)
def test_damaged_shard_costs_its_recordings(releases, intact, tmp_path, form, damage):
    data = shutil.copytree(releases[form], tmp_path / "copy")
    path = shard_path(data, form)
    path.write_bytes(FILES[damage](path.read_bytes()))
    reports = check(data, tmp_path / "work", intact[form])
    # Readers use the first archive in a tar file and the last footer in a parquet file.
    if damage == "twice":
        return
    reasons = {item.reason for item in reports}
    assert reasons & {"damaged shard", "truncated", "incomplete shard", "unusable audio"}
    assert any(path.name in item.id + item.detail for item in reports)


@pytest.mark.parametrize("form", FORMS)
def test_missing_shard_or_folder_or_link_is_reported(releases, intact, tmp_path, form):
    for name, put in (
        ("missing", lambda path: None),
        ("folder", lambda path: path.mkdir()),
        ("broken link", lambda path: path.symlink_to("none")),
    ):
        data = shutil.copytree(releases[form], tmp_path / name)
        path = shard_path(data, form)
        path.unlink()
        put(path)
        found, rejected = prepared(data, tmp_path / f"{name} work")
        assert len(found) == (SHARDS - 1) * ROWS
        expected = ["missing shard"] if form == "tar" else ["damaged shard"] * (name != "missing")
        assert [item.reason for item in rejected] == expected
        assert all(path.name in item.id + item.detail for item in rejected)


@pytest.mark.parametrize("form", FORMS)
def test_copy_of_a_shard_adds_no_recording(releases, intact, tmp_path, form):
    """A second download of a shard is ignored. A shard that was replaced by a copy of another is reported."""
    data = shutil.copytree(releases[form], tmp_path / "copy")
    path = shard_path(data, form)
    copy = path.with_name(f"{path.stem} (1){path.suffix}")
    shutil.copy(path, copy)
    reports = check(data, tmp_path / "work", intact[form])
    assert [item.reason for item in reports] == (["duplicate file"] if form == "parquet" else [])
    copy.unlink()
    shutil.copy(path.with_name(path.name.replace("1", "2", 1)), path)
    found, rejected = prepared(data, tmp_path / "work2")
    assert len(found) == (SHARDS - 1) * ROWS
    expected = {"incomplete shard", "no caption", "no audio in its shard"}
    assert {item.reason for item in rejected} == (expected if form == "tar" else {"duplicate file"})


@pytest.mark.parametrize("form", FORMS)
def test_sidecars_and_other_files_are_ignored(releases, intact, tmp_path, form):
    data = shutil.copytree(releases[form], tmp_path / "copy")
    for path in [path for path in data.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(100))
        path.with_name(f"{path.name}.part").write_bytes(path.read_bytes()[:100])
    (data / ".DS_Store").write_bytes(b"\0")
    assert not check(data, tmp_path / "work", intact[form])


@pytest.mark.parametrize("form", FORMS)
def test_flipped_bytes_are_detected_or_change_one_caption(releases, intact, tmp_path, form):
    rng = random.Random(form)
    data = shutil.copytree(releases[form], tmp_path / "copy")
    path = shard_path(data, form)
    raw = path.read_bytes()
    for trial in range(25):
        path.write_bytes(flip_bit(raw, rng))
        check(data, tmp_path / f"work {trial}", intact[form], changes=1)


@pytest.mark.parametrize("form", FORMS)
def test_many_damaged_shards_end_the_run(releases, tmp_path, form):
    data = shutil.copytree(releases[form], tmp_path / "copy")
    paths = sorted(path for path in data.rglob(f"*.{form}") if "parquet/" not in str(path.relative_to(data)))
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=rf"unusable shards: 2 of 4.*{paths[0].name}.*max_broken"):
        prepared(data, tmp_path / "work")
    found, rejected = prepared(data, tmp_path / "work", max_broken=0.5)
    assert len(found) == 2 * ROWS
    assert sum(item.reason in ("damaged shard", "truncated") for item in rejected) == 2
    paths[0].unlink()
    with pytest.raises(DataError, match="max_broken"):
        prepared(data, tmp_path / "work", max_broken=0.0)


def test_unusable_release_ends_the_run(releases, tmp_path):
    for form in FORMS:
        data = shutil.copytree(releases[form], tmp_path / form)
        for path in data.rglob(f"*.{form}"):
            path.write_bytes(b"")
        for max_broken in (0.05, 1.0):
            with pytest.raises(DataError, match=r"unusable (shards: [1-4] of 4|recordings: 48 of 48)"):
                prepared(data, tmp_path / f"{form} work", max_broken=max_broken)


def test_shard_that_cannot_be_read_ends_the_run(releases, tmp_path, monkeypatch):
    """The content of such a shard is unknown, and the next run may be able to read it."""
    for form in FORMS:
        path = shard_path(releases[form], form)
        open_, file = builtins.open, parquet.pq.ParquetFile

        def denied(name, *args, path=path, open_=open_, **kwargs):
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return open_(name, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", denied)
            patch.setattr(parquet.pq, "ParquetFile", lambda name, file=file: denied(name, open_=file))
            with pytest.raises(ReadError, match=path.name):
                prepared(releases[form], tmp_path / form)


# --- the table --------------------------------------------------------------------------------------------

TABLES: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "last byte missing": (lambda raw: raw[:-1], 1),
    "truncated caption": (lambda raw: raw[:-5], 1),
    "truncated name": (lambda raw: raw[: raw.rindex(b"\t") - 3], 1),
    "repeated row": (lambda raw: raw + raw.splitlines(keepends=True)[-1], 0),
    "two captions": (lambda raw: raw + raw.splitlines()[-1].partition(b"\t")[0] + b"\tx\n", 0),
    "row without a tab": (lambda raw: raw.replace(b"\t", b" ", 1), 1),
    "row in Shift_JIS": (lambda raw: raw.replace(TEXTS[0].encode(), TEXTS[0].encode("cp932"), 1), 1),
    "byte order mark": (lambda raw: b"\xef\xbb\xbf" + raw, 1),
    "header": (lambda raw: b"name\ttranscription\n" + raw, 0),
    "empty rows": (lambda raw: raw.replace(b"\n", b"\n\n"), 0),
}


@pytest.mark.parametrize("damage", TABLES)
def test_damaged_row_costs_one_recording(releases, intact, tmp_path, damage):
    change, n_lost = TABLES[damage]
    data = shutil.copytree(releases["tar"], tmp_path / "copy")
    path = data / "tsv" / "tiny.tsv"
    path.write_bytes(change(path.read_bytes()))
    found, rejected = prepared(data, tmp_path / "work")
    assert len(found) == SHARDS * ROWS - n_lost
    assert all(intact["tar"][id] == content for id, content in found.items())
    if damage != "empty rows":
        assert any("tiny.tsv:" in item.detail for item in rejected)


@pytest.mark.parametrize("encoding", ["cp932", "euc_jp", "utf-16"])
def test_converted_table_ends_the_run(releases, tmp_path, encoding):
    data = shutil.copytree(releases["tar"], tmp_path / "copy")
    path = data / "tsv" / "tiny.tsv"
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    with pytest.raises(DataError, match=r"tiny\.tsv"):
        prepared(data, tmp_path / "work")


def test_different_tables_of_a_subset_end_the_run(releases, intact, tmp_path):
    data = shutil.copytree(releases["tar"], tmp_path / "copy")
    shutil.copy(data / "tsv" / "tiny.tsv", data / "tiny.tsv")
    assert not check(data, tmp_path / "work", intact["tar"])
    (data / "tiny.tsv").write_bytes((data / "tsv" / "tiny.tsv").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tiny\.tsv and .*tiny\.tsv"):
        prepared(data, tmp_path / "work")


def test_parquet_rows_without_audio_are_rejected_and_captions_are_optional(releases, tmp_path):
    data = shutil.copytree(releases["parquet"], tmp_path / "copy")
    path = shard_path(data, "parquet")
    rows = pq.read_table(path).to_pylist()
    rows[0]["audio"] = None
    rows[1]["transcription"] = None
    rows[2]["audio"]["path"] = None
    rows[3]["audio"] = {"bytes": b"x" * 100, "path": "x.flac"}
    pq.write_table(pa.Table.from_pylist(rows), path)
    found, rejected = prepared(data, tmp_path / "work")
    assert len(found) == SHARDS * ROWS - 2
    assert [item.reason for item in rejected] == ["unusable audio"] * 2


def test_share_of_recordings_that_cannot_be_decoded_is_limited(releases, tmp_path):
    """Only decoding detects the damage, because the headers of the recordings are intact."""
    data = shutil.copytree(releases["tar"], tmp_path / "copy")
    path = shard_path(data, "tar")
    content = path.read_bytes()
    for n_damaged in (1, 3):
        raw, position = bytearray(content), 0
        for _ in range(n_damaged):
            position = raw.index(b"fLaC", position + 1)
            raw[position + 2000] ^= 1
        path.write_bytes(raw)
        out = tmp_path / str(n_damaged)
        out.mkdir()
        config = stage.Config("reazonspeech", str(data), {"subset": "tiny", "processes": 1})
        if n_damaged == 1:
            assert stage.prepare(config, out)["rejected"] == {"unusable audio": 1}
            with pytest.raises(DataError, match=r"1 of 48.*max_unusable"):
                stage.prepare(replace(config, max_unusable=0.0), out)
            continue
        with pytest.raises(DataError, match=r"3 of 48 .*rejected\.jsonl.*prepare.max_unusable"):
            stage.prepare(config, out)
        assert len((out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 3
        assert stage.prepare(replace(config, max_unusable=0.1), out)["utterances"] == 45
    with pytest.raises(ConfigError, match="max_unusable"):
        stage.Config("reazonspeech", max_unusable=2.0)
