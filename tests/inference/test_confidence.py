"""Tests of word confidences: calibration on data with a known distribution, reliability, and output."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from jahubert.cli.transcripts import mark_uncertain
from jahubert.errors import CheckpointError, DataError
from jahubert.inference import writers
from jahubert.inference.confidence import Calibration, confidence, fit_calibration, reliability
from jahubert.inference.transcribe import Transcript, Word


def random_words(seed: int, n: int, truth: Calibration) -> tuple[list[list[float]], list[bool]]:
    rng = np.random.default_rng(seed)
    scores = [(-rng.exponential(rng.uniform(0.05, 2), rng.integers(1, 8))).tolist() for _ in range(n)]
    return scores, [bool(rng.random() < truth.confidence(word)) for word in scores]


def test_calibration_recovers_the_distribution_of_errors():
    truth = Calibration(2.5, 1.2, 0.6)
    fitted = fit_calibration(*random_words(0, 20_000, truth))
    assert (fitted.bias, fitted.mean, fitted.lowest) == pytest.approx((2.5, 1.2, 0.6), abs=0.25)
    scores, correct = random_words(1, 5000, truth)
    calibrated = reliability([confidence(word, fitted) for word in scores], correct)
    plain = reliability([confidence(word, None) for word in scores], correct)
    assert calibrated.calibration_error < 0.03 < plain.calibration_error
    assert calibrated.confidence == pytest.approx(calibrated.accuracy, abs=0.02)
    assert sum(words for _, _, words in calibrated.bins) == calibrated.words == 5000


def test_separable_words_give_a_finite_calibration():
    fitted = fit_calibration([[-0.1], [-0.2], [-5.0], [-math.inf]], [True, True, False, False])
    assert fitted.confidence([-0.1]) > 0.9 > 0.1 > fitted.confidence([-6.0])
    assert all(math.isfinite(value) for value in fitted.to_json().values())


def test_uncalibrated_confidence_is_the_geometric_mean():
    assert confidence([math.log(0.5), math.log(0.125)], None) == pytest.approx(0.25)


def test_calibration_is_stored_as_json():
    calibration = Calibration(1.0, -0.5, 0.25)
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    for content in (None, [], {"bias": 1.0}, {"bias": 1.0, "mean": "x", "lowest": 0.0}):
        with pytest.raises(CheckpointError, match="bias"):
            Calibration.from_json(content)


def test_empty_data_is_rejected():
    with pytest.raises(DataError):
        fit_calibration([], [])
    with pytest.raises(DataError):
        reliability([], [])


def make_word(kana: str, confidence: float, phones: str = "a") -> Word:
    return Word(kana, tuple(phones), 0.0, 0.1, -1.0, ((0.0, 0.1),) * len(phones), confidence)


def test_transcript_confidence_is_weighted_by_phonemes():
    transcript = Transcript((make_word("ア", 0.9, "aaa"), make_word("イ", 0.5)), 1.0, -1.0)
    assert transcript.confidence == pytest.approx(0.8)
    assert Transcript((), 1.0, 0.0).confidence is None


def test_json_has_confidences_and_text_marks_the_low_ones():
    transcript = Transcript((make_word("ア", 0.91239), make_word("イ", 0.2)), 1.0, -1.0)
    content = json.loads(writers.render(transcript, "json"))
    assert [word["confidence"] for word in content["words"]] == [0.912, 0.2]
    assert content["confidence"] == pytest.approx(0.556, abs=1e-3)
    assert mark_uncertain(transcript).text == "ア イ(?)"
    unknown = json.loads(writers.render(Transcript((make_word("ア", math.nan),), 1.0, -1.0), "json"))
    assert unknown["words"][0]["confidence"] is None is unknown["confidence"]


def test_written_words_are_joined_without_spaces():
    words = (replace(make_word("アメ", 0.9), written="雨"), replace(make_word("ダ", 0.1), written="だ"))
    transcript = Transcript(words, 1.0, -1.0)
    assert transcript.text == "雨だ" and mark_uncertain(transcript).text == "雨だ(?)"
    assert "雨だ" in writers.render(transcript, "srt")
    content = json.loads(writers.render(transcript, "json"))
    assert [word["written"] for word in content["words"]] == ["雨", "だ"]
    assert writers.render(transcript, "text", phonemes=True) == "a | a\n"
