"""Tests of the voices recipe: speakers, exact phone times, sentences, and reuse of existing files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("pyopenjtalk")

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import VOWELS
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.experiment.registry import recipe_module

voices = recipe_module("voices")
CONFIG = voices.Config(minutes=0.3, dev_share=0.2, test_share=0.2, speakers=5, processes=1)
TEXTS = [
    "昨日、東京で新しいパソコンを買いましょう。",
    "急いで病院へ行った。",
    "ピューレを食べます。",
    "明日は晴れる。",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[Utterance]]:
    work = tmp_path_factory.mktemp("voices")
    return work, list(voices.prepare(None, work, CONFIG, 3))


def read(item: Utterance) -> np.ndarray:
    wave, rate = soundfile.read(item.audio.path, dtype="int16")
    assert rate == 16_000
    return wave


def test_splits_have_their_minutes_and_share_neither_speakers_nor_sentences(corpus):
    by_split: dict[str, list[Utterance]] = {}
    for item in corpus[1]:
        by_split.setdefault(item.split, []).append(item)
    assert set(by_split) == {"train", "dev", "test"}
    for attribute in ("speaker", "text"):
        values = [{getattr(item, attribute) for item in items} for items in by_split.values()]
        assert len(set().union(*values)) == sum(map(len, values))
    minutes = sum(item.n_samples for item in corpus[1]) / 16_000 / 60
    assert CONFIG.minutes <= minutes < CONFIG.minutes + 0.4


def test_alignment_covers_the_audio_with_the_words_and_pauses(corpus):
    for item in corpus[1]:
        assert len(read(item)) == item.n_samples
        ends = [phone.end for phone in item.alignment]
        assert [phone.start for phone in item.alignment] == [0, *ends[:-1]]
        assert ends[-1] == item.n_samples
        spoken = [phone.symbol for phone in item.alignment if phone.symbol != "pau"]
        assert spoken == [phone for word in item.words for phone in word]


def test_phone_times_match_the_audio(corpus):
    """At every speed, pauses are quiet and vowels are loud."""
    levels: dict[str, list[float]] = {"pau": [], "vowel": []}
    for item in corpus[1]:
        wave = read(item).astype(float)
        for phone in item.alignment:
            quarter = (phone.end - phone.start) // 4
            part = wave[phone.start + quarter : phone.end - quarter]
            kind = "vowel" if phone.symbol.rstrip(":") in VOWELS else phone.symbol
            if kind in levels:
                levels[kind].append(10 * np.log10(np.mean(part**2) / np.mean(wave**2) + 1e-12))
    assert np.median(levels["pau"]) < -15
    assert np.median(levels["vowel"]) > -4


def test_second_run_with_another_process_count_keeps_the_files(corpus, tmp_path):
    work, items = corpus
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*.flac")}
    assert list(voices.prepare(None, work, CONFIG, 3)) == items
    assert times == {path: path.stat().st_mtime_ns for path in work.rglob("*.flac")}
    texts = [item.text for item in items]
    several = replace(CONFIG, processes=2)
    again = list(voices.synthesize(texts * 3, tmp_path, several, 3))
    alone = list(voices.synthesize(texts, tmp_path / "alone", CONFIG, 3))
    assert len(again) == len(alone) >= 4
    for one, other in zip(again, alone, strict=True):
        assert np.array_equal(read(one), read(other))


def test_speakers_depend_on_the_seed(corpus, tmp_path):
    first, second = (
        [item.speaker for item in voices.synthesize(TEXTS, tmp_path, CONFIG, seed)] for seed in (3, 4)
    )
    assert first != second


def test_excluded_and_repeated_sentences_are_omitted(tmp_path):
    table = tmp_path / "test.tsv"
    table.write_text(f"file\ttext\nx.flac\t{TEXTS[0][:-1]} \n", encoding="utf-8")
    config = replace(CONFIG, exclude=(str(table),), minutes=5.0, dev_share=0.0, test_share=0.0)
    items = list(voices.synthesize([*TEXTS, *TEXTS], tmp_path, config, 0))
    assert [item.text for item in items] == TEXTS[1:]


def test_text_without_a_reading_is_rejected(tmp_path):
    config = replace(CONFIG, dev_share=0.0, test_share=0.0)
    items = list(voices.synthesize(["。", TEXTS[1]], tmp_path, config, 0))
    assert isinstance(items[0], Rejected)
    assert isinstance(items[1], Utterance)


def test_sentences_are_read_from_plain_lines_and_lines_with_readings(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(
        "流し斬りが入る。\n\nROHAN4600_0001:流(なが)し斬(ぎ)りが入(はい)れば。,ナガシギリガハイレバ。\n",
        encoding="utf-8",
    )
    assert voices.read_sentences(path) == ["流し斬りが入る。", "流し斬りが入れば。"]
    with pytest.raises(DataError, match=r"missing\.txt"):
        voices.read_sentences(tmp_path / "missing.txt")


def test_all_invalid_settings_are_reported():
    with pytest.raises(ConfigError, match=r"(?s)minutes.*alpha.*speed"):
        voices.Config(minutes=0, alpha=(0.6, 0.5), speed=(0.1, 1.0))


def test_folder_without_voices_is_rejected(tmp_path):
    (tmp_path / "._a.htsvoice").touch()  # metadata of macOS
    with pytest.raises(DataError, match=r"no file \*\.htsvoice"):
        voices.find_voices(tmp_path)
    with pytest.raises(DataError, match=r"missing: folder not found"):
        voices.find_voices(tmp_path / "missing")


def test_voices_are_mixed_within_their_group(shared_data, tmp_path):
    groups = voices.find_voices(shared_data / "hts_voices")
    names = [{voice.name for voice in group} for group in groups]
    assert {"mei_normal", "takumi_sad"} <= next(group for group in names if "takumi_normal" in group)
    assert not any("takumi_normal" in group and "tohoku-f01-sad" in group for group in names)
    speakers = [voices.draw_speaker(groups, CONFIG, f"x-{i}") for i in range(60)]
    assert len({tuple(voice.name for voice in speaker.voices) for speaker in speakers}) == len(groups)
    assert all(sum(speaker.style.weights) == pytest.approx(1) for speaker in speakers)
    config = replace(CONFIG, minutes=0.2, dev_share=0.0, test_share=0.0, speakers=100)
    items = list(voices.synthesize(TEXTS, tmp_path, config, 1, shared_data / "hts_voices"))
    for item in items:
        assert len(read(item)) == item.n_samples
        assert np.abs(read(item)).max() > 1000
