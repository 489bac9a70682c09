"""Tests of manifests: round trips, rejection of unusable utterances, and loading of audio."""

from __future__ import annotations

import errno
import json
import logging
import pickle

import numpy as np
import pytest
import soundfile

from jahubert.audio import AudioSource
from jahubert.audio import sources as audio
from jahubert.errors import AudioError, DataError, ReadError
from jahubert.train.data import manifest as module
from jahubert.train.data import utterances
from jahubert.train.data.manifest import Manifest, Phone, Rejected, Utterance, Utterances, write_manifest


def utterance(i: int, **changes) -> Utterance:
    fields = {"id": f"発話{i:05d}", "audio": AudioSource(f"/corpus/名 前{i}.wav"), "n_samples": 1000 + i}
    return Utterance(**{**fields, **changes})


FULL = Utterance(
    id="full",
    audio=AudioSource("/corpus/shard.tar", 512, 32044),
    start=320,
    n_samples=1600,
    speaker="話者",
    text="今日は",
    words=(("ky", "o:"), ("w", "a")),
    split="eval1",
    alignment=(Phone("ky", 0, 800), Phone("o:", 800, 1600)),
)


def test_rows_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)  # results in several record batches
    items = [utterance(i) for i in range(30)] + [FULL]
    rejected = [Rejected("x", "too short"), Rejected("y", "too short"), Rejected("z", "no audio")]
    counts = write_manifest(tmp_path / "m.arrow", iter(items[:10] + rejected + items[10:]))
    manifest = Manifest(tmp_path / "m.arrow")
    assert len(manifest) == 31
    assert [manifest[i] for i in range(31)] == items
    assert manifest[-1] == FULL
    assert manifest.n_samples.dtype == np.int64
    assert manifest.n_samples.tolist() == [item.n_samples for item in items]
    assert manifest.ids() == [item.id for item in items]
    assert manifest.ids([30, 2]) == ["full", items[2].id]
    assert manifest.indices("eval1").tolist() == [30]
    assert manifest.indices(has_words=True).tolist() == [30]
    assert manifest.indices("train", has_words=False).tolist() == list(range(30))
    assert manifest.indices(has_alignment=True).tolist() == [30]
    assert counts == manifest.counts
    assert counts["utterances"] == 31
    assert counts["rejected"] == {"no audio": 1, "too short": 2}
    assert counts["splits"]["eval1"] == {"utterances": 1, "hours": 0.1 / 3600, "with_words": 1}
    lines = (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"id": d.id, "reason": d.reason} for d in rejected]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.arrow", "rejected.jsonl"]
    with pytest.raises(IndexError):
        manifest[31]
    with pytest.raises(DataError, match=r"no split 'evall'.*eval1, train"):
        manifest.indices("evall")


def columns(first: int, n: int, **changes) -> Utterances:
    fields = {
        "path": "/corpus/000.tar",
        "ids": [f"000/{i}" for i in range(first, first + n)],
        "offset_N": np.arange(first, first + n) * 1024,
        "length_N": np.full(n, 700),
        "n_samples_N": np.arange(n) + 5000,
        "texts": [f"文{i}" for i in range(n)],
        "split": "dev",
    }
    return Utterances(**{**fields, **changes})


def test_column_blocks_equal_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 4)
    batch = columns(0, 9)
    items = [utterance(0), batch, Rejected("x", "no audio"), utterance(1), columns(9, 0), columns(9, 2)]
    counts = write_manifest(tmp_path / "m.arrow", items)
    manifest = Manifest(tmp_path / "m.arrow")
    assert [manifest[i] for i in range(len(manifest))] == [utterance(0), *batch, utterance(1), *columns(9, 2)]
    assert batch[3].audio == AudioSource("/corpus/000.tar", 3072, 700)
    assert manifest.indices("dev", has_words=False).tolist() == [*range(1, 10), 11, 12]
    n_samples = sum(range(5000, 5009)) + 5000 + 5001
    assert counts["splits"]["dev"] == {"utterances": 11, "hours": n_samples / 16_000 / 3600, "with_words": 0}
    write_manifest(tmp_path / "n.arrow", [utterance(0), columns(0, 9, texts=["違う"] * 9)])
    assert Manifest(tmp_path / "n.arrow").fingerprint != manifest.fingerprint
    part = batch.take([2, 5], "test")
    assert [(item.id, item.split, item.n_samples) for item in part] == [
        ("000/2", "test", 5002),
        ("000/5", "test", 5005),
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([columns(0, 3), columns(2, 3)], r"duplicate utterance id '000/2': .*000.tar \(bytes 2048"),
        ([columns(0, 3), utterance(0, id="000/1")], "'000/1'"),
        ([columns(0, 2, n_samples_N=np.array([1, 0]))], "'000/1'.*invalid start or length"),
        ([columns(0, 2, ids=["a", ""])], "has no id"),
        ([columns(0, 2, split="")], "has no split"),
        ([columns(0, 1, texts=["\udce3"])], "000.tar.*Unicode"),
    ],
)
def test_unusable_columns_are_rejected(tmp_path, items, message):
    with pytest.raises(DataError, match=message):
        write_manifest(tmp_path / "m.arrow", items)
    assert not (tmp_path / "m.arrow").exists()


@pytest.mark.parametrize("rows", [3, 1000])
def test_duplicate_ids_name_both_sources(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(module, "_BATCH_ROWS", rows)
    items = [utterance(i) for i in range(10)]
    items[8] = utterance(8, id=items[2].id, start=160)
    with pytest.raises(DataError) as error:
        write_manifest(tmp_path / "m.arrow", items)
    for part in (items[2].id, "/corpus/名 前2.wav", "/corpus/名 前8.wav", "from sample 160"):
        assert part in str(error.value)
    assert not (tmp_path / "m.arrow").exists()


def test_hash_collisions_are_not_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_id_hash", lambda id: len(id))
    write_manifest(tmp_path / "m.arrow", [utterance(i) for i in range(10)])
    assert len(Manifest(tmp_path / "m.arrow")) == 10


def test_fingerprint_depends_on_content_but_not_on_the_folder(tmp_path):
    def fingerprint(folder, items):
        folder.mkdir(exist_ok=True)
        write_manifest(folder / "m.arrow", items)
        return Manifest(folder / "m.arrow").fingerprint

    items = [utterance(i) for i in range(5)]
    first = fingerprint(tmp_path / "a", items)
    assert first == fingerprint(tmp_path / "b", items)
    assert first != fingerprint(tmp_path / "c", items[::-1])
    assert first != fingerprint(tmp_path / "c", [*items[:4], utterance(4, text="違う")])

    def items_in(folder):
        return [utterance(0, audio=AudioSource(str(folder / "audio" / "0.wav")))]

    one, two = tmp_path / "one", tmp_path / "two"
    assert fingerprint(one, items_in(one)) == fingerprint(two, items_in(two))
    one.rename(tmp_path / "moved")
    assert Manifest(tmp_path / "moved" / "m.arrow")[0].audio.path == str(tmp_path / "moved/audio/0.wav")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "has no id"),
        ({"n_samples": 0}, "invalid start or length"),
        ({"start": -1}, "invalid start or length"),
        ({"words": (("a",), ())}, "word without phones"),
        ({"alignment": (Phone("a", 0, 1002),)}, "alignment.*1001 samples"),
        ({"alignment": (Phone("a", 0, 10), Phone("b", 9, 20))}, "alignment"),
        ({"text": "\udce3"}, "Unicode"),
    ],
)
def test_unusable_utterances_are_rejected(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as error:
        write_manifest(tmp_path / "m.arrow", [utterance(0), utterance(1, **changes)])
    assert "/corpus/名 前1.wav" in str(error.value)
    assert not (tmp_path / "m.arrow").exists()


def test_empty_manifest_reports_the_most_frequent_reason(tmp_path):
    with pytest.raises(DataError, match="no transcript"):
        write_manifest(tmp_path / "m.arrow", [Rejected(str(i), "no transcript") for i in range(2)])
    assert (tmp_path / "rejected.jsonl").is_file()
    with pytest.raises(DataError, match="no usable utterances"):
        write_manifest(tmp_path / "m.arrow", [])


def test_failing_recipe_keeps_the_old_manifest(tmp_path):
    def failing():
        yield utterance(0)
        raise RuntimeError("unplugged")

    path = tmp_path / "m.arrow"
    write_manifest(path, [utterance(3)])
    with pytest.raises(RuntimeError):
        write_manifest(path, failing())
    assert Manifest(path)[0] == utterance(3)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_and_damaged_manifests_are_rejected(tmp_path):
    with pytest.raises(DataError, match=r"m.arrow: manifest not found"):
        Manifest(tmp_path / "m.arrow")
    path = tmp_path / "m.arrow"
    write_manifest(path, [utterance(i) for i in range(50)])
    content = path.read_bytes()
    for broken in (b"", b"not arrow", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged"):
            Manifest(path)


def test_loading_checks_the_length(tmp_path):
    samples = np.linspace(-0.5, 0.5, 4000, dtype=np.float32)
    soundfile.write(tmp_path / "音.wav", samples, 16000, subtype="FLOAT")
    source = AudioSource(str(tmp_path / "音.wav"))
    items = [
        Utterance("a", source, 100, 500),
        Utterance("long", source, 3900, 200),
        Utterance("gone", AudioSource("/no/such.wav"), 0, 5),
    ]
    write_manifest(tmp_path / "m.arrow", items)
    # DataLoader workers receive a pickled manifest.
    manifest = pickle.loads(pickle.dumps(Manifest(tmp_path / "m.arrow")))
    assert manifest.load(0).numpy().tolist() == samples[100:600].tolist()
    with pytest.raises(AudioError, match=r"'long'.*100 samples.* 200:"):
        manifest.load(1)
    with pytest.raises(AudioError, match=r"'gone'.*/no/such.wav"):
        manifest.load(2)


def test_transient_read_errors_are_retried(tmp_path, monkeypatch, caplog):
    """After the last retry, the error is raised. Missing files and files without audio are not retried."""
    caplog.set_level(logging.WARNING)
    wav, text = tmp_path / "a.wav", tmp_path / "a.m4a"
    soundfile.write(wav, np.zeros(400), 16000)
    text.write_text("not audio " * 99)
    sources = [AudioSource(str(path)) for path in (wav, text, tmp_path / "none.wav")]
    write_manifest(tmp_path / "m.arrow", [Utterance(s.path, s, n_samples=400) for s in sources])
    manifest = Manifest(tmp_path / "m.arrow")
    delays, failures = [], [2]

    def flaky_open(*args, **kwargs):
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return open(*args, **kwargs)

    monkeypatch.setattr(utterances.time, "sleep", delays.append)
    monkeypatch.setattr(audio, "open", flaky_open, raising=False)
    assert len(manifest.load(0)) == 400 and delays == [1.0, 5.0]
    assert "a.wav" in caplog.messages[0] and "Stale file handle" in caplog.messages[0]
    failures[0] = 99
    with pytest.raises(ReadError, match=r"a.wav.*Stale file handle"):
        manifest.load(0)
    assert delays == [1.0, 5.0, 1.0, 5.0, 20.0]
    failures[0] = 0
    with pytest.raises(AudioError, match=r"a.m4a"):
        manifest.load(1)
    with pytest.raises(AudioError, match=r"none.wav"):
        manifest.load(2)
    assert len(delays) == 5
