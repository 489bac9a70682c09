"""Tests of the reazonspeech recipe on synthetic releases: captions, damaged shards, and cached indices."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.reazonspeech_tree import RATE, Release, flac, name_of, write_headers, write_parquet_headers

from jahubert import run
from jahubert.audio import load_audio
from jahubert.errors import ConfigError, DataError
from jahubert.train.data import utterances
from jahubert.train.data.manifest import Manifest, Rejected, Utterances
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.stages import prepare as stage
from jahubert.train.stages import targets

RECIPE = Path(__file__).parents[2] / "recipes" / "reazonspeech" / "prepare.py"
recipe = recipe_module("reazonspeech")
tar_index, parquet_shards = sys.modules["tar_index"], sys.modules["parquet_shards"]


def read(data: Path | None, work: Path, **options):
    """Return the utterances and the rejected items."""
    subset = "all" if data is not None and any(data.glob("*.parquet")) else "tiny"
    config = recipe.Config(**{"subset": subset, "processes": 1, **options})
    items = list(recipe.prepare(data, work, config, 0))
    rows = [item for batch in items if isinstance(batch, Utterances) for item in batch]
    return rows, [item for item in items if isinstance(item, Rejected)]


def content(rows) -> dict[str, tuple[int, str]]:
    return {f"{item.id}.flac": (item.n_samples, item.text) for item in rows}


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_captions_are_matched_with_recordings(tmp_path, dot, form, end):
    release = Release(tmp_path / "reazonspeech-v1", shards=2, rows=3, dot=dot)
    release.write(end=end, form=form)
    rows, rejected = read(tmp_path, tmp_path)  # the release folder is in tmp_path
    assert not rejected
    assert list(content(rows).items()) == list(release.rows.items())
    for item in rows:
        assert len(load_audio(item.audio)) == item.n_samples
    member = next(data for name, data in release.members[0] if name == f"{rows[0].id}.flac")
    raw = Path(rows[0].audio.path).read_bytes()
    assert raw[rows[0].audio.offset :][: rows[0].audio.length] == member


def test_prepare_and_targets_read_a_release(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    release = Release(tmp_path / "corpus", shards=3, rows=6)
    data = release.write()
    options = {"subset": "tiny", "dev": 7, "test": 4, "processes": 2}
    counts = {}
    for check in (True, False):
        out = tmp_path / f"out {check}" / "prepare"
        out.mkdir(parents=True)
        config = stage.Config(recipe="reazonspeech", data=str(data), options=options, check_audio=check)
        counts[check] = stage.run(config, out)
        manifest = Manifest(out / "manifest.arrow")
        items = [manifest[i] for i in range(len(manifest))]
        assert content(items) == release.rows
        assert [item.split for item in items] == ["dev"] * 7 + ["test"] * 4 + ["train"] * 7
        assert counts[check]["hours"] == pytest.approx(sum(n for n, _ in release.rows.values()) / RATE / 3600)
        assert counts[check]["splits"]["dev"]["utterances"] == 7
        assert len(manifest.load(0)) == items[0].n_samples
        assert all(item.words == () and item.alignment == () and item.speaker == "" for item in items)
        assert "shards: 3 of 3, utterances: 18" in caplog.text
    (tmp_path / "targets").mkdir()
    # Most recordings are too short for the phones of their captions.
    metrics = targets.run(
        targets.Config(tmp_path / "out True" / "prepare" / "manifest.arrow"), tmp_path / "targets"
    )
    assert metrics["utterances"] + sum(metrics["rejected"].values()) == 18
    assert set(metrics["rejected"]) == {"target longer than its audio"}


def test_indices_are_equal_for_any_number_of_processes_and_cached(tmp_path, monkeypatch):
    data = write_headers(tmp_path / "corpus", shards=5, rows=200)
    one = list(recipe.prepare(data, tmp_path / "one", recipe.Config(processes=1), 0))
    two = list(recipe.prepare(data, tmp_path / "two", recipe.Config(processes=2), 0))
    for a, b in zip(one, two, strict=True):
        assert (a.path, a.ids, a.texts, a.split) == (b.path, b.ids, b.texts, b.split)
        assert np.array_equal(a.offset_N, b.offset_N) and np.array_equal(a.n_samples_N, b.n_samples_N)
    read_shards = []
    index_shard = tar_index.index_shard
    monkeypatch.setattr(
        tar_index, "index_shard", lambda shard: read_shards.append(shard.name) or index_shard(shard)
    )
    again = list(recipe.prepare(data, tmp_path / "one", recipe.Config(processes=1), 0))
    assert [batch.ids for batch in again] == [batch.ids for batch in one] and not read_shards
    os.utime(data / "data" / "003.tar")
    list(recipe.prepare(data, tmp_path / "one", recipe.Config(processes=1), 0))
    assert read_shards == ["003.tar"]


def test_only_a_later_shard_is_read(tmp_path, monkeypatch):
    release = Release(tmp_path / "corpus", shards=3, rows=3)
    data = release.write()
    third = release.shard(2).rename(tmp_path / "002.tar")
    rows, rejected = read(data, tmp_path)
    assert len(rows) == 6
    assert [(item.id, item.reason, item.detail) for item in rejected] == [
        ("002.tar", "missing shard", "rows in tiny.tsv: 3")
    ]
    third.rename(release.shard(2))
    read_shards = []
    index_shard = tar_index.index_shard
    monkeypatch.setattr(
        tar_index, "index_shard", lambda shard: read_shards.append(shard.name) or index_shard(shard)
    )
    assert content(read(data, tmp_path)[0]) == release.rows
    assert read_shards == ["002.tar"]


def test_finished_manifest_is_extended_without_reading_other_shards(tmp_path, monkeypatch):
    """As in the README, the records of the stage are deleted, and the stage is rerun with its work folder."""
    release = Release(tmp_path / "corpus", shards=3, rows=4)
    data, exp = release.write(), tmp_path / "exp"
    third = release.shard(2).rename(tmp_path / "002.tar")
    command = ["recipe=reazonspeech", "stage=prepare", f"data={data}", f"exp={exp}", "subset=tiny"]
    command += ["prepare.check_audio=false", "prepare.options.processes=1"]
    assert run.main(command) == 0
    before = list(Manifest(exp / "prepare/manifest.arrow").ids())
    third.rename(release.shard(2))
    for record in ("provenance.json", "started.json"):
        (exp / "prepare" / record).unlink()
    read_shards = []
    indexer = sys.modules["tar_index"]
    index_shard = indexer.index_shard
    monkeypatch.setattr(
        indexer, "index_shard", lambda shard: read_shards.append(shard.name) or index_shard(shard)
    )
    assert run.main(command) == 0
    after = list(Manifest(exp / "prepare/manifest.arrow").ids())
    assert len(before) == 8 and after[:8] == before and len(after) == 12
    assert read_shards == ["002.tar"]


def test_late_shard_is_reported_and_only_it_is_decoded(tmp_path, monkeypatch, capsys, caplog):
    """The reported commands add the shard without decoding the other shards."""
    release = Release(tmp_path / "corpus", shards=3, rows=4)
    release.add(0, name_of(0, 90), flac(8000)[:-3000], "途中まで")
    data, exp = release.write(), tmp_path / "exp"
    command = ["recipe=reazonspeech", "stage=prepare", f"data={data}", f"exp={exp}", "subset=tiny"]
    command += ["prepare.options.processes=1", "prepare.options.dev=5", "prepare.options.test=2"]
    second = release.shard(1).rename(tmp_path / "001.tar")
    decoded = []
    load_utterance = stage.load_utterance
    monkeypatch.setattr(stage, "load_utterance", lambda item: decoded.append(item.id) or load_utterance(item))
    assert run.main(command) == 0
    before = list(Manifest(exp / "prepare/manifest.arrow").ids())
    assert len(before) == 8 and len(set(decoded)) == 9
    caplog.clear()
    assert run.main(command) == 0
    assert "missing" not in caplog.text
    second.rename(release.shard(1))
    assert run.main(command) == 0
    assert "files that were missing" in caplog.text
    assert str(release.shard(1)) in caplog.text
    subprocess.run(re.search("^  (rm .*)$", caplog.text, re.M)[1], shell=True, check=True)
    decoded.clear()
    assert run.main(command) == 0
    manifest = Manifest(exp / "prepare/manifest.arrow")
    assert len(decoded) == 4 and all(id.startswith("001/") for id in decoded)
    # The result equals that of a complete release.
    assert [f"{id}.flac" for id in manifest.ids()] == list(release.rows)
    other = tmp_path / "other"
    assert run.main([argument.replace(str(exp), str(other)) for argument in command]) == 0
    assert Manifest(other / "prepare/manifest.arrow").fingerprint == manifest.fingerprint
    rejected, others = ((folder / "prepare/rejected.jsonl").read_text() for folder in (exp, other))
    assert rejected == others and name_of(0, 90).removesuffix(".flac") in rejected


def test_changed_shard_is_decoded_again(tmp_path, monkeypatch):
    release = Release(tmp_path / "corpus", shards=2, rows=3)
    data, decoded = release.write(), []
    load_utterance = stage.load_utterance
    monkeypatch.setattr(stage, "load_utterance", lambda item: decoded.append(item.id) or load_utterance(item))
    config = stage.Config("reazonspeech", str(data), {"subset": "tiny", "processes": 1})
    for expected in (6, 0):
        stage.run(config, tmp_path)
        assert len(decoded) == expected
        decoded.clear()
    os.utime(release.shard(1))
    stage.run(config, tmp_path)
    assert len(decoded) == 3 and all(id.startswith("001/") for id in decoded)


def test_indexing_is_shared_by_two_machines(tmp_path, monkeypatch):
    data = write_headers(tmp_path / "corpus", shards=5, rows=50)
    script, index = RECIPE.with_name("tar_index.py"), tmp_path / "work" / "index"
    for part, shards, rows in (("1/2", 3, 150), ("2/2", 2, 100)):
        done = subprocess.run(
            [sys.executable, script, data / "data", index, "--part", part, "--processes", "2"],
            capture_output=True,
            text=True,
            cwd=RECIPE.parents[2],
        )
        assert done.returncode == 0, done.stderr
        assert f"indexed shards: {shards}, recordings: {rows}" in done.stdout
    monkeypatch.setattr(tar_index, "index_shard", lambda shard: pytest.fail(f"{shard} was read again"))
    items = list(recipe.prepare(data, tmp_path / "work", recipe.Config(processes=1), 0))
    assert sum(len(item) for item in items) == 250
    invalid = subprocess.run(
        [sys.executable, script, data / "data", index, "--part", "3/2"], capture_output=True, text=True
    )
    assert invalid.returncode == 2 and "--part 3/2" in invalid.stderr


def test_damaged_members_are_rejected(tmp_path):
    release = Release(tmp_path / "corpus", shards=1, rows=3)
    recording = flac(8000)
    release.add(0, name_of(0, 90), b"", "空です")
    release.add(0, name_of(0, 91), b"not audio" * 200, "違います")
    # Only decoding detects that the next recording is truncated.
    release.add(0, name_of(0, 92), recording[: len(recording) // 2], "途中まで")
    release.add(0, name_of(0, 93), recording, None)
    release.add(0, name_of(0, 0), recording, None)  # a duplicate member name
    release.add(0, name_of(0, 94), flac(4000, 8000), "八キロヘルツ", 8000)
    release.add(0, name_of(0, 95), flac(100), "短い", 100)
    release.table += [f"{name_of(0, 96)}\tありません".encode(), name_of(0, 97).encode()]
    release.table += [
        b"nothing\tx",
        f"{name_of(0, 0)}\t二度目".encode(),
        f"{name_of(0, 98)}\t".encode() + b"\xff",
    ]
    data = release.write()
    rows, rejected = read(data, tmp_path, max_broken=1.0)
    assert content(rows) == release.rows | {name_of(0, 92): (8000, "途中まで")}
    assert {(item.id, item.reason) for item in rejected} == {
        ("line 11", "row without a shard"),
        (name_of(0, 97), "row without a tab"),
        (name_of(0, 0), "duplicate row"),
        (name_of(0, 98), "caption that is not UTF-8"),
        (name_of(0, 90), "unusable audio"),
        (name_of(0, 91), "unusable audio"),
        (name_of(0, 93), "no caption"),
        (name_of(0, 0), "duplicate name"),
        (name_of(0, 96), "no audio in its shard"),
    }
    assert any(item.detail.startswith("tiny.tsv:11: b'nothing") for item in rejected)
    for check, n in ((True, 4), (False, 5)):
        out = tmp_path / f"out {check}"
        out.mkdir()
        options = {"subset": "tiny", "processes": 2, "max_broken": 1.0}
        config = stage.Config(
            recipe="reazonspeech", data=str(data), options=options, check_audio=check, max_unusable=1.0
        )
        counts = stage.run(config, out)
        assert counts["utterances"] == n
        assert counts["rejected"]["shorter than one frame"] == 1
        assert counts["rejected"]["unusable audio"] == 2 + check


def test_release_with_only_an_unusable_recording_ends_the_run(tmp_path):
    release = Release(tmp_path / "corpus", shards=1, rows=0)
    release.add(0, name_of(0, 0), b"not audio" * 200, "違います")
    with pytest.raises(DataError, match=r"unusable recordings: 1 of 1.*unusable audio") as caught:
        read(release.write(), tmp_path)
    assert "max_broken" not in str(caught.value)  # a higher limit would not help


def test_parquet_shards_equal_tar_shards(tmp_path, monkeypatch):
    """Parquet files as on the Hub give the same utterances, and a second run converts only changed files."""
    release = Release(tmp_path / "corpus", shards=3, rows=6)
    data = release.write_parquet()
    options = {"dev": 7, "test": 4}
    rows, rejected = read(data, tmp_path / "work", **options)
    assert not rejected
    names = [name for members in release.members.values() for name, _ in members]
    assert [item.id.partition("/")[2] + ".flac" for item in rows] == names
    assert [(item.n_samples, item.text) for item in rows] == [release.rows[name] for name in names]
    assert [item.split for item in rows] == ["dev"] * 7 + ["test"] * 4 + ["train"] * 7
    for item in rows:
        assert len(load_audio(item.audio)) == item.n_samples
    with tarfile.open(rows[0].audio.path) as archive:
        stem = "train-00000-of-00003"
        assert archive.getnames() == [f"{stem}/{name}" for name, _ in release.members[0]]
        for member, (_, content) in zip(archive.getmembers(), release.members[0], strict=True):
            assert archive.extractfile(member).read() == content
    converted = []
    copy = parquet_shards._copy_recordings
    monkeypatch.setattr(
        parquet_shards,
        "_copy_recordings",
        lambda shard, tar: converted.append(shard.name) or copy(shard, tar),
    )
    again, _ = read(data, tmp_path / "work", **options)
    assert again == rows and not converted
    os.utime(sorted(data.glob("*.parquet"))[1])
    assert read(data, tmp_path / "work", **options)[0] == rows
    assert converted == ["train-00001-of-00003.parquet"]


def test_damaged_parquet_recordings_and_files_are_rejected(tmp_path):
    release = Release(tmp_path / "corpus", shards=1, rows=2)
    release.add(0, "empty.flac", b"", "空です")
    release.add(0, "text.flac", b"not audio" * 200, "違います")
    release.add(0, "長い" * 40 + ".flac", flac(4000), "長い名前")
    data = release.write_parquet()
    with pytest.raises(DataError, match=r"unusable recordings: 2 of 5.*empty\.flac.*max_broken"):
        read(data, tmp_path / "work")
    rows, rejected = read(data, tmp_path / "work", max_broken=1.0)
    assert [item.text for item in rows][2:] == ["長い名前"]
    assert len(rows) == 3 and [item.reason for item in rejected] == ["unusable audio"] * 2
    pq.write_table(pa.table({"audio": [b""]}), tmp_path / "columns.parquet")
    for number, content in enumerate((b"PAR1", b"", (tmp_path / "columns.parquet").read_bytes())):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"x.parquet.*(parquet|transcription)"):
            read(folder, tmp_path / "work2")


def test_subset_selects_a_folder_of_parquet_files(tmp_path):
    """A subset that selects nothing, and a folder with two kinds of shards, are reported."""
    flat = Release(tmp_path / "flat", shards=1, rows=2).write_parquet()
    hub = tmp_path / "hub" / "tiny" / "train"
    hub.parent.mkdir(parents=True)
    flat.rename(hub)
    assert len(read(tmp_path / "hub", tmp_path / "work", subset="tiny")[0]) == 2
    assert len(read(hub, tmp_path / "work")[0]) == 2
    with pytest.raises(DataError, match="subset=tiny"):
        read(hub, tmp_path / "work", subset="tiny")
    with pytest.raises(DataError, match=r"subset=all.*: tiny$"):
        read(tmp_path / "hub", tmp_path / "work", subset="all")
    release = Release(tmp_path / "both", shards=1, rows=2).write()
    shutil.copy(next(hub.glob("*.parquet")), release / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet.*\.tsv"):
        read(release, tmp_path / "work")


def test_columns_of_parquet_files_may_vary_or_are_named(tmp_path):
    content = flac(4000)
    tables = {
        "no-path": {"audio": [{"bytes": content}], "text": ["一"]},
        "numbers": {"audio": [{"bytes": content}], "name": [7], "text": ["一"]},
    }
    for name, columns in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "x.parquet")
        rows, rejected = read(tmp_path / name, tmp_path / "work" / name)
        assert [row.text for row in rows] == ["一"] and not rejected
    (tmp_path / "decoded").mkdir()
    decoded = {"audio": [{"array": [0.0], "sampling_rate": RATE}], "text": ["一"]}
    pq.write_table(pa.table(decoded), tmp_path / "decoded" / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet.*bytes.*sampling_rate"):
        read(tmp_path / "decoded", tmp_path / "work")


@pytest.mark.parametrize(
    ("damage", "usable", "reason"),
    [
        (lambda raw: raw[: len(raw) - 10_240 - 4000], 3, "truncated"),
        (lambda raw: raw[:3000], 0, "truncated"),
        (lambda raw: raw[:700], 0, "damaged shard"),
        (lambda raw: b"\1" * 600, 0, "damaged shard"),
    ],
)
def test_damaged_shard_yields_the_members_before_the_damage(tmp_path, damage, usable, reason):
    release = Release(tmp_path / "corpus", shards=2, rows=4)
    data = release.write()
    release.change(0, damage)
    rows, rejected = read(data, tmp_path)
    shard = [item for item in rows if item.id.startswith("000/")]
    assert len(rows) - len(shard) == 4 and len(shard) == usable
    reasons = [item.reason for item in rejected]
    assert reasons[0] == reason
    assert reasons[1:] == ["no audio in its shard"] * (4 - usable - (reason == "truncated"))


@pytest.mark.parametrize("length", [b"-00000001000", b"\x80" + (1 << 40).to_bytes(11, "big")])
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE]
)
def test_impossible_length_in_a_tar_header_ends_the_shard(tmp_path, kind, length):
    header = bytearray(tarfile.TarInfo("a.flac").tobuf())
    header[124:136] = length
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "000.tar").write_bytes(header + bytes(512))
    (index,) = tar_index.index_shards([tmp_path / "000.tar"], tmp_path / "index", 1)
    reasons = [reason for _, reason, _ in index["broken"]]
    assert not index["names"] and (reasons in (["damaged shard"], ["truncated"]) or kind == tarfile.DIRTYPE)


def test_members_that_are_no_files_are_skipped(tmp_path):
    """Links and devices are not followed, and names are never used as paths."""
    shard, content = tmp_path / "000.tar", flac(4000)
    with tarfile.open(shard, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"000/{kind.decode()}.flac")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("/etc/passwd", "../../x.flac", "000/a.flac", "000/a.flac"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (index,) = tar_index.index_shards([shard], tmp_path / "index", 1)
    assert index["names"] == ["/etc/passwd", "../../x.flac", "000/a.flac", "000/a.flac"]
    assert not index["broken"] and sorted(os.listdir(tmp_path)) == ["000.tar", "index"]
    assert os.listdir(tmp_path / "index") == ["000.json"]


class FailingMembers:
    """Replacement for `_members` that fails `failures` times for shard 001, after the first recording."""

    def __init__(self, failures: int):
        self.failures, self.members = failures, tar_index._members

    def __call__(self, file, size, broken, shard):
        for number, member in enumerate(self.members(file, size, broken, shard)):
            if number and shard == "001.tar" and self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "Input/output error")
            yield member


def test_shard_is_read_again_after_an_error_of_the_file_system(tmp_path, monkeypatch):
    data = Release(tmp_path / "corpus", shards=2, rows=2).write()
    delays: list[float] = []
    monkeypatch.setattr(utterances.time, "sleep", delays.append)
    monkeypatch.setattr(tar_index, "_members", FailingMembers(2))
    rows, rejected = read(data, tmp_path)
    assert len(rows) == 4 and not rejected and delays == [1.0]


def test_unreadable_shard_stops_the_stage_and_is_read_by_the_next_run(tmp_path, monkeypatch):
    data = Release(tmp_path / "corpus", shards=2, rows=2).write()
    with monkeypatch.context() as patch:
        patch.setattr(utterances.time, "sleep", lambda seconds: None)
        patch.setattr(tar_index, "_members", FailingMembers(99))
        with pytest.raises(DataError, match=r"001\.tar"):
            read(data, tmp_path)
    rows, rejected = read(data, tmp_path)
    assert len(rows) == 4 and not rejected


@pytest.mark.parametrize("failures", [2, 99])
def test_parquet_is_read_again_after_an_error_of_the_file_system(tmp_path, monkeypatch, failures):
    data = Release(tmp_path / "corpus", shards=1, rows=600).write_parquet()
    monkeypatch.setattr(utterances.time, "sleep", lambda seconds: None)
    opened, reads = pq.ParquetFile, [0]

    class Failing:
        """Parquet file whose second batch cannot be read the first `failures` times."""

        def __init__(self, path):
            self.file, self.schema_arrow = opened(path), opened(path).schema_arrow

        def iter_batches(self, *args, **kwargs):
            for number, batch in enumerate(self.file.iter_batches(*args, **kwargs)):
                if number == 1 and reads[0] < failures:
                    reads[0] += 1
                    raise OSError(errno.ESTALE, "Stale file handle")
                yield batch

    monkeypatch.setattr(pq, "ParquetFile", Failing)
    if failures == 99:
        with pytest.raises(DataError, match=r"\.parquet"):
            read(data, tmp_path / "work")
    else:
        rows, rejected = read(data, tmp_path / "work")
        assert len(rows) == 600 and not rejected


def test_table_may_have_any_order(tmp_path):
    release = Release(tmp_path / "corpus", shards=3, rows=5)
    release.table = release.table[::2] + release.table[1::2]
    rows, rejected = read(release.write(), tmp_path)
    assert content(rows) == release.rows and not rejected
    assert recipe.Captions(tmp_path / "corpus" / "tsv" / "tiny.tsv").count("001") == 5


def test_table_and_shards_may_be_in_one_folder(tmp_path):
    release = Release(tmp_path / "corpus", shards=2, rows=2)
    data = release.write()
    for path in [*data.glob("*/*.tsv"), *data.glob("*/*.tar")]:
        path.rename(data / path.name)
    for folder in ("tsv", "data"):
        (data / folder).rmdir()
    assert content(read(data, tmp_path)[0]) == release.rows


def test_long_member_names_are_read(tmp_path):
    release = Release(tmp_path / "corpus", shards=1, rows=1)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        long = f"000/{form}/" + "/".join(["長い" * 8] * 4) + "/名前.flac"
        if form == tarfile.USTAR_FORMAT:
            long = f"000/{'a' * 80}/{'b' * 60}.flac"
        release.members[0] = []
        release.table = []
        release.rows = {}
        release.add(0, long, flac(4000), "長い", 4000)
        assert content(read(release.write(form=form), tmp_path / str(form))[0]) == {long: (4000, "長い")}


def test_error_of_a_worker_process_is_reported(tmp_path):
    shards = [tmp_path / "000.tar", tmp_path / "001.tar"]
    with pytest.raises(DataError, match=r"000\.tar"):
        list(tar_index.index_shards(shards, tmp_path / "index", 2))


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from jahubert.train.data.manifest import Manifest
from jahubert.train.stages import prepare

data, out = map(Path, sys.argv[1:])
options = {"subset": "all", "processes": 2}
config = prepare.Config(recipe="reazonspeech", data=str(data), options=options, check_audio=False)
started = time.perf_counter()
rows = prepare.run(config, out)["utterances"]
seconds = time.perf_counter() - started
started = time.perf_counter()
opened = len(Manifest(out / "manifest.arrow"))
opening = time.perf_counter() - started
# For this process, getrusage is not used, because it includes the memory of the parent before exec.
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([rows, opened, rows / seconds, opening, peak / 1024**2]))
"""


@pytest.mark.parametrize(
    ("shards", "rows"), [(4, 500), pytest.param(64, 15_625, marks=pytest.mark.slow)], ids=["few", "a million"]
)
@pytest.mark.parametrize("write", [write_headers, write_parquet_headers])
def test_indexing_is_fast_and_needs_little_memory(tmp_path, shards, rows, write):
    if not sys.platform.startswith("linux"):
        pytest.skip("the test reads /proc, which only Linux has")
    data = write(tmp_path / "corpus", shards, rows)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(data), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RECIPE.parents[2])
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    n_rows, opened, rate, opening, gib = json.loads(done.stdout)
    assert n_rows == opened == shards * rows
    assert opening < 1
    assert gib < 2
    assert rate > 20_000 or n_rows < 100_000  # with few rows, startup dominates the time


def test_missing_data_is_reported(tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(DataError, match=r"set data=|needs data=FOLDER|found no shard"):
            read(data, tmp_path)
    release = Release(tmp_path / "reazonspeech-v2", shards=1, rows=1)
    release.write()
    with pytest.raises(DataError, match=r"smal.tsv.* tiny"):
        read(tmp_path, tmp_path, subset="smal")
    release.shard(0).unlink()
    with pytest.raises(DataError, match=r"tiny.tsv.*000.tar"):
        read(tmp_path, tmp_path)
    Release(tmp_path / "reazonspeech-v1", shards=1, rows=1).write()
    with pytest.raises(DataError, match="reazonspeech-v1 and reazonspeech-v2"):
        read(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="dev"):
        recipe.Config(dev=-1)
