"""Tests of the tofugu recipe: splits by reading, trimmed and joined words, and rejected files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import kana_to_phones
from jahubert.train.data.manifest import Manifest, Rejected, Utterance, write_manifest
from jahubert.train.experiment.registry import recipe_module

tofugu = recipe_module("tofugu")
TOFUGU = Path(os.environ.get("JAHUBERT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tofugu"
RATE = 44_100
KANA = "かきくけこさしすせそたちつてとなにぬねの"


def tone(seconds: float, silence: float = 0.2) -> np.ndarray:
    """Return a stereo tone between two silences, at 44.1 kHz."""
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * RATE)) / RATE)
    quiet = np.zeros(round(silence * RATE))
    return np.stack([np.concatenate([quiet, wave, quiet])] * 2, axis=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Write a synthetic corpus of 60 words, two of which are homophones, and four unusable files."""
    root = tmp_path_factory.mktemp("corpus")
    ogg = root / "lib" / "ogg"
    ogg.mkdir(parents=True)
    names = [f"語{i}【{KANA[i % 20]}{KANA[(i * 7 + i // 20) % 20]}】" for i in range(58)]
    names += ["橋【はし】", "箸【はし】"]
    for i, name in enumerate(names):
        soundfile.write(ogg / f"{name}.ogg", tone(0.3 + 0.01 * i), RATE)
    (ogg / "壊【こわれ】.ogg").write_bytes(b"OggS" + b"\0" * 100)
    (ogg / "漢【漢字】.ogg").write_bytes((ogg / "橋【はし】.ogg").read_bytes())
    (ogg / "無名.ogg").write_bytes((ogg / "橋【はし】.ogg").read_bytes())
    soundfile.write(ogg / "静【しずか】.ogg", np.zeros((RATE, 2)), RATE)
    return root


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> tuple[Path, list[Utterance], list[Rejected]]:
    work = tmp_path_factory.mktemp("work")
    items = list(tofugu.prepare(corpus, work, tofugu.Config(dev_share=0.2, test_share=0.2), 0))
    return (
        work,
        [i for i in items if isinstance(i, Utterance)],
        [i for i in items if isinstance(i, Rejected)],
    )


def words_in(items: list[Utterance], prefix: str) -> list[tuple[str, ...]]:
    return sorted(word for item in items if item.id.startswith(prefix) for word in item.words)


def test_unusable_files_are_rejected_with_a_reason(prepared):
    assert {(item.id, item.reason) for item in prepared[2]} == {
        ("壊【こわれ】", "unusable audio"),
        ("漢【漢字】", "reading that is not kana"),
        ("無名", "file name without a reading in 【】"),
        ("静【しずか】", "silent audio"),
    }


def test_splits_have_disjoint_readings_and_all_words(prepared):
    items = prepared[1]
    splits = {name: words_in(items, f"word-{name}-") for name in ("train", "dev", "test")}
    assert sum(map(len, splits.values())) == 60
    assert all(splits.values())
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not set(splits[a]) & set(splits[b])
    homophones = [item.split for item in items if item.text in ("橋", "箸")]
    assert len(set(homophones)) == 1
    assert {item.split for item in items} == {"train", "dev", "test", "dev_joined", "test_joined"}
    assert len({item.id for item in items}) == len(items)


def test_joined_utterances_use_held_out_words_once_and_training_words_twice(prepared):
    items = prepared[1]
    assert words_in(items, "joined-test-") == words_in(items, "word-test-")
    assert words_in(items, "joined-dev-") == words_in(items, "word-dev-")
    assert words_in(items, "joined-train-") == sorted(2 * words_in(items, "word-train-"))
    for item in items:
        if item.id.startswith("joined"):
            assert 2 * 16_000 <= item.n_samples <= 12 * 16_000
            assert len(item.words) == len(item.text.split(" ")) > 1
            assert item.split == {"train": "train"}.get(
                item.id.split("-")[1], item.id.split("-")[1] + "_joined"
            )


def test_word_times_match_the_tones(prepared):
    work, items, _ = prepared
    times = [json.loads(line) for line in (work / "word-times.jsonl").read_text().splitlines()]
    by_id = {item.id: item for item in items}
    assert [row["id"] for row in times] == [id for id in by_id if id.startswith("joined")]
    pauses = []
    for row in times:
        item = by_id[row["id"]]
        wave, rate = soundfile.read(item.audio.path)
        assert rate == 16_000
        assert len(wave) == item.n_samples == row["words"][-1][1]
        assert len(row["words"]) == len(item.words)
        for start, end in row["words"]:
            # The silence of 0.2 s around each tone is shortened to about 50 ms.
            assert np.std(wave[start + 960 : end - 960]) > 0.05
            assert np.std(wave[start + 80 : start + 560]) < 0.01
            assert np.std(wave[end - 560 : end - 80]) < 0.01
        pauses += [b[0] - a[1] for a, b in zip(row["words"], row["words"][1:], strict=False)]
    assert min(pauses) == 0
    assert all(pause == 0 or 800 <= pause <= 6400 for pause in pauses)


def test_second_run_keeps_existing_files(prepared, corpus, tmp_path):
    work, items, rejected = prepared
    config = tofugu.Config(dev_share=0.2, test_share=0.2)
    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("*.flac")}
    deleted = Path(items[0].audio.path)
    stamps.pop(deleted)
    before = deleted.read_bytes()
    deleted.unlink()
    counts = write_manifest(tmp_path / "manifest.arrow", tofugu.prepare(corpus, work, config, 0))
    assert counts["utterances"] == len(items)
    assert sum(counts["rejected"].values()) == len(rejected) == 4
    assert deleted.read_bytes() == before
    assert stamps == {path: path.stat().st_mtime_ns for path in work.rglob("*.flac") if path != deleted}
    manifest = Manifest(tmp_path / "manifest.arrow")
    assert [manifest[i].id for i in range(len(manifest))] == [item.id for item in items]
    assert len(manifest.load(len(manifest) - 1)) == items[-1].n_samples


def test_splits_depend_on_the_seed(corpus, prepared):
    sources = [
        source
        for path in tofugu._files(corpus)
        if not isinstance(source := tofugu._parse_name(path), Rejected)
    ]
    first, again, other = (tofugu._split(sources, tofugu.Config(), seed) for seed in (0, 0, 1))
    assert first == again != other


def test_missing_corpus_names_the_repository(tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(DataError, match="tofugu/japanese-vocabulary-pronunciation-audio"):
            list(tofugu.prepare(data, tmp_path / "work", tofugu.Config(), 0))


@pytest.mark.parametrize(
    "options", [{"min_seconds": 7}, {"min_seconds": 0}, {"dev_share": 0.6, "test_share": 0.4}]
)
def test_inconsistent_sizes_are_rejected(options, corpus, tmp_path):
    with pytest.raises(ConfigError):
        list(tofugu.prepare(corpus, tmp_path, tofugu.Config(**options), 0))


def test_all_real_words_are_used(tmp_path):
    if not (TOFUGU / "lib" / "ogg").is_dir():
        pytest.skip("needs the Tofugu corpus")
    ogg = tmp_path / "data" / "lib" / "ogg"
    ogg.mkdir(parents=True)
    for path in sorted((TOFUGU / "lib" / "ogg").iterdir())[::60]:
        (ogg / path.name).symlink_to(path)
    items = list(tofugu.prepare(tmp_path / "data", tmp_path / "work", tofugu.Config(), 0))
    assert not [item for item in items if isinstance(item, Rejected)]
    by_text = {item.text: item.words for item in items if item.id.startswith("word")}
    assert len(by_text) > 80
    assert by_text["〜丁目"] == (tuple(kana_to_phones("チョーメ")),)
