"""Tests of the error rates of characters, with and without punctuation marks."""

from __future__ import annotations

import pytest

from jahubert.train.data.targets import UNKNOWN, character_set, kana_set
from jahubert.train.evaluation.scoring import ScoredUtterance, SetScore, measures_for


def test_punctuation_counts_in_its_own_measure_only():
    measures = measures_for(character_set("今日は、。雨"))
    assert [measure.name for measure in measures] == ["cer", "cer_punctuation"]
    reference = [(symbol,) for symbol in "今日は、雨。"]
    hypothesis = [("今",), ("日",), ("は",), (UNKNOWN,), ("。",)]
    rates = SetScore([ScoredUtterance("u", "t", "s", reference, hypothesis)], measures).rates(0, 10)
    assert rates["cer"]["rate"] == pytest.approx(1 / 4)  # the hypothesis has <unk> for 雨
    assert rates["cer_punctuation"]["rate"] == pytest.approx(2 / 6)
    assert "punctuation" in rates["cer_punctuation"]["normalizer"]


def test_vocabularies_without_punctuation_have_one_character_measure():
    assert [measure.name for measure in measures_for(character_set("今日"))] == ["cer"]
    assert [measure.name for measure in measures_for(kana_set())] == ["wer", "kana_cer"]
