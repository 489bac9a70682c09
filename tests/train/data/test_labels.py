"""Tests that label stores are complete or absent, resumable, and bound to their manifest."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jahubert.audio import AudioSource
from jahubert.errors import DataError, StaleError
from jahubert.frames import HUBERT, MFCC
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest

HEADER = LabelHeader(100, "mfcc", None, "c" * 64, None, "m" * 64, False)
N_FRAMES = np.random.default_rng(0).integers(0, 30, 53)


def units(row: int, n_units: int = 100) -> np.ndarray:
    return np.random.default_rng(row).integers(0, n_units, N_FRAMES[row])


def fill(
    folder: Path, header: LabelHeader = HEADER, shards: int | None = None, shard_size: int = 10
) -> LabelWriter:
    writer = LabelWriter(folder, header, N_FRAMES, shard_size)
    for shard in writer.pending()[:shards]:
        writer.write(shard, [units(row, header.n_units) for row in writer.rows(shard)])
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("n_units", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (500, np.uint16)]
)
def test_units_are_read_back(tmp_path, n_units, dtype):
    header = replace(HEADER, n_units=n_units)
    fill(tmp_path, header).finish()
    store = pickle.loads(pickle.dumps(LabelStore(tmp_path)))  # DataLoader workers get such a copy
    assert store.header == header
    assert len(store) == 53
    for row in range(53):
        assert store[row].dtype == dtype
        assert store.units(row, int(N_FRAMES[row])).tolist() == units(row, n_units).tolist()
    expected = np.bincount(np.concatenate([units(row, n_units) for row in range(53)]), minlength=n_units)
    assert store.unit_counts().tolist() == expected.tolist()
    assert sorted(contents(tmp_path)) == ["header.json", "offsets.npy", "units.bin"]
    with pytest.raises(DataError, match=r"utterance 7 has \d+ units, but 99 frames"):
        store.units(7, 99)
    for row in (53, -1):
        with pytest.raises(IndexError):
            store[row]
    with pytest.raises(ValueError, match="read-only"):
        store[int(N_FRAMES.argmax())][0] = 1


def test_pickled_store_holds_only_the_folder(tmp_path):
    fill(tmp_path).finish()
    assert len(pickle.dumps(LabelStore(tmp_path))) < 500


def test_resumed_store_is_identical_for_any_order_and_shard_size(tmp_path):
    fill(tmp_path / "complete").finish()
    writer = fill(tmp_path / "parts", shards=2)
    assert writer.pending() == [2, 3, 4, 5]
    with pytest.raises(DataError, match="incomplete shards: 4"):
        writer.finish()
    again = LabelWriter(tmp_path / "parts", HEADER, N_FRAMES, shard_size=7)  # the shard size remains 10
    assert again.pending() == [2, 3, 4, 5]
    for shard in (5, 3, 2, 4):
        again.write(shard, [units(row) for row in again.rows(shard)])
    again.finish()
    assert contents(tmp_path / "parts") == contents(tmp_path / "complete")
    done = LabelWriter(tmp_path / "parts", HEADER, N_FRAMES)
    assert done.pending() == []
    done.finish()
    fill(tmp_path / "other", shard_size=4).finish()
    assert contents(tmp_path / "other") == contents(tmp_path / "complete")


def fill_until_killed(folder: Path, n_calls: int) -> bool:
    """Fill a store in a child process that is killed after `n_calls` disk operations, if it gets that far.

    Returns:
        Whether the child process was killed.
    """
    child = os.fork()
    if child == 0:
        remaining = iter(range(n_calls))

        def counted(real):
            def call(*args, **kwargs):
                if next(remaining, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (Path, "read_bytes"),
            (shutil, "rmtree"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            fill(folder, shard_size=20).finish()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_store_survives_a_kill_at_any_disk_operation(tmp_path):
    fill(tmp_path / "complete", shard_size=20).finish()
    n_calls = 0
    while True:
        folder = tmp_path / str(n_calls)
        killed = fill_until_killed(folder, n_calls)
        if not (folder / "header.json").exists():
            with pytest.raises(DataError, match="no finished label store"):
                LabelStore(folder)
        fill(folder, shard_size=20).finish()
        assert contents(folder) == contents(tmp_path / "complete")
        if not killed:
            break
        n_calls += 1
    assert n_calls > 20


def test_full_disk_leaves_no_complete_file(tmp_path, monkeypatch):
    writer = fill(tmp_path, shards=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"000001\.bin.*No space left"):
            writer.write(1, [units(row) for row in writer.rows(1)])
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.suffix != ".json"] == ["000000.bin"]
    assert writer.pending() == [1, 2, 3, 4, 5]
    fill(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left"):
            writer.finish()
    with pytest.raises(DataError, match="no finished label store"):
        LabelStore(tmp_path)
    writer.finish()
    assert len(LabelStore(tmp_path)) == 53


def test_damaged_shards_are_written_again(tmp_path):
    fill(tmp_path)
    for number in (1, 2, 4):
        shard = tmp_path / "shards" / f"{number:06d}.bin"
        content = bytearray(shard.read_bytes())
        content[number] ^= 1
        shard.write_bytes(content if number != 2 else content[:-1])
    assert LabelWriter(tmp_path, HEADER, N_FRAMES).pending() == [1, 2, 4]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [("n_units", 50), ("centroids", "d" * 64), ("model", "w" * 64), ("manifest", "n" * 64), ("layer", 6)],
)
def test_header_mismatch_names_the_field(tmp_path, finished, field, value):
    writer = fill(tmp_path)
    if finished:
        writer.finish()
    with pytest.raises(StaleError, match=rf"{field} was .*, now {value!r}"):
        LabelWriter(tmp_path, replace(HEADER, **{field: value}), N_FRAMES)


def test_units_that_do_not_fit_in_16_bits_are_rejected():
    assert replace(HEADER, n_units=65_536).dtype == np.uint16
    with pytest.raises(DataError, match="65537"):
        replace(HEADER, n_units=65_537)


def test_invalid_units_are_rejected(tmp_path):
    writer = LabelWriter(tmp_path, HEADER, N_FRAMES, 10)
    good = [units(row) for row in range(10)]
    row = int(np.flatnonzero(N_FRAMES[:10])[0])
    for bad, message in (
        (good[:-1], r"utterances \(expected 10, found 9\)"),
        ([*good[:row], good[row][1:], *good[row + 1 :]], rf"utterance {row}: {N_FRAMES[row] - 1} units, but"),
        ([*good[:row], good[row] + 100, *good[row + 1 :]], rf"utterance {row}: units must be in 0\.\.99"),
        ([*good[:row], good[row] * 0.5, *good[row + 1 :]], rf"utterance {row}: .*float64"),
    ):
        with pytest.raises(DataError, match=message):
            writer.write(0, bad)
    assert writer.pending() == [0, 1, 2, 3, 4, 5]


def test_damaged_stores_are_rejected(tmp_path):
    fill(tmp_path).finish()
    original = contents(tmp_path)
    for name, content, message in (
        ("units.bin", original["units.bin"][:-1], "units.bin"),
        ("header.json", b"{", "header.json"),
        ("header.json", b'{"n_units": 3}', "not a label store"),
        ("offsets.npy", original["offsets.npy"][:50], "not a label store"),
        ("offsets.npy", b"", "not a label store"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            LabelStore(tmp_path)
        (tmp_path / name).write_bytes(original[name])
    (tmp_path / "offsets.npy").unlink()
    with pytest.raises(DataError, match=r"offsets\.npy"):
        LabelStore(tmp_path)


def test_store_is_bound_to_its_manifest(tmp_path):
    lengths = [HUBERT.n_samples(int(n)) + 100 if n else 200 for n in N_FRAMES]

    def manifest(name, changes):
        items = [
            Utterance(f"u{i}", AudioSource(f"/c/{i}.wav"), 0, n + changes.get(i, 0))
            for i, n in enumerate(lengths)
        ]
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name / "m.arrow", items)
        return Manifest(tmp_path / name / "m.arrow")

    right, other = manifest("right", {}), manifest("other", {11: 320})
    fill(tmp_path / "l", replace(HEADER, manifest=right.fingerprint)).finish()
    LabelStore(tmp_path / "l").check(right)
    with pytest.raises(DataError, match="different manifest"):
        LabelStore(tmp_path / "l").check(other)
    fill(tmp_path / "m", replace(HEADER, manifest=other.fingerprint)).finish()
    with pytest.raises(DataError, match=r"'u11'"):
        LabelStore(tmp_path / "m").check(other)


def test_units_of_another_frame_grid_are_rejected(tmp_path):
    write_manifest(tmp_path / "m.arrow", [Utterance("u", AudioSource("/c/u.wav"), 0, 16_000)])
    manifest = Manifest(tmp_path / "m.arrow")
    header = replace(HEADER, manifest=manifest.fingerprint, window=MFCC.window, hop=MFCC.hop)
    writer = LabelWriter(tmp_path / "l", header, MFCC.n_frames(manifest.n_samples))
    writer.write(0, [np.zeros(MFCC.n_frames(16_000), int)])
    writer.finish()
    with pytest.raises(DataError, match="hop of 160"):
        LabelStore(tmp_path / "l").check(manifest)


def test_store_without_frames_is_empty(tmp_path):
    writer = LabelWriter(tmp_path, HEADER, np.zeros(3, int))
    writer.write(0, [np.zeros(0, int)] * 3)
    writer.finish()
    assert len(LabelStore(tmp_path)) == 3
    assert LabelStore(tmp_path)[1].tolist() == []
