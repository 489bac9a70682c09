"""Tests of word confidences: calibration on data with a known distribution, reliability, and output."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from jahubert.cli.transcripts import mark_uncertain
from jahubert.errors import CheckpointError, DataError
from jahubert.frames import HUBERT
from jahubert.inference import writers
from jahubert.inference.confidence import (
    Calibration,
    WordFeatures,
    align_best,
    confidence,
    fit_calibration,
    reliability,
    word_features,
)
from jahubert.inference.ctc import Hypothesis, Span, forced_align
from jahubert.inference.fusion import SymbolFusion
from jahubert.inference.transcribe import Transcript, Word, words_of
from jahubert.lm.kneser_ney import train_ngram
from jahubert.phonemes import PhonemeSet

TRUTH = Calibration(2.5, WordFeatures(mean=1.2, utterance=0.6, posterior=1.5, lm=0.4))


def random_words(seed: int, n: int) -> tuple[list[WordFeatures], list[bool]]:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.05, 4, (n, 3))
    features = [
        WordFeatures(-float(a), -float(b), float(rng.random()), -float(c))
        for a, b, c in rng.exponential(scales)
    ]
    return features, [bool(rng.random() < TRUTH.confidence(word)) for word in features]


def test_calibration_recovers_the_distribution_of_errors():
    fitted = fit_calibration(*random_words(0, 20_000))
    assert (fitted.bias, *fitted.weights) == pytest.approx((TRUTH.bias, *TRUTH.weights), abs=0.25)
    features, correct = random_words(1, 5000)
    calibrated = reliability([confidence(word, fitted) for word in features], correct)
    plain = reliability([confidence(word, None) for word in features], correct)
    assert calibrated.calibration_error < 0.03 < plain.calibration_error
    assert calibrated.confidence == pytest.approx(calibrated.accuracy, abs=0.02)
    assert calibrated.auc > plain.auc > 0.5
    assert sum(words for _, _, words in calibrated.bins) == calibrated.words == 5000


def test_area_under_the_curve_counts_ties_as_half():
    assert reliability([0.9, 0.5, 0.5, 0.1], [True, True, False, False]).auc == pytest.approx(3.5 / 4)
    assert reliability([0.9, 0.8], [True, True]).auc is None


def test_separable_words_give_a_finite_calibration():
    features = [WordFeatures(mean, -0.1, 1.0, 0.0) for mean in (-0.1, -0.2, -5.0, -10.0)]
    fitted = fit_calibration(features, [True, True, False, False])
    assert fitted.confidence(features[0]) > 0.9 > 0.1 > fitted.confidence(features[3])
    assert all(math.isfinite(value) for value in fitted.to_json().values())


def test_uncalibrated_confidence_is_the_geometric_mean():
    spans = [Span(2, 0, 1, math.log(0.5)), Span(3, 1, 2, math.log(0.125))]
    (features,) = word_features([spans])
    assert confidence(features, None) == pytest.approx(0.25)


def test_features_are_those_of_the_word_and_of_the_utterance():
    first = [Span(2, 0, 1, -1.0, 0.9, -2.0), Span(3, 1, 2, -3.0, 0.9, -4.0)]
    second = [Span(4, 5, 6, -math.inf, 0.25, -100.0)]
    assert word_features([first, second]) == [
        WordFeatures(mean=-2.0, utterance=pytest.approx(-14 / 3), posterior=0.9, lm=-2.0),
        WordFeatures(mean=-10.0, utterance=pytest.approx(-14 / 3), posterior=0.25, lm=-10.0),
    ]
    assert word_features([]) == []


def test_posterior_is_the_share_of_the_beam_that_has_the_word():
    """The words 3 and 3 4 begin with the same label, and the hypotheses differ in the number of words."""
    boundary, logp = 1, torch.zeros(12, 5).log_softmax(-1)
    labels = [(2, 1, 3, 1, 2), (2, 1, 3, 4, 1, 2), (2, 1, 2), (4, 1, 3, 1, 2), (2, 1, 3)]
    shares = (0.5, 0.2, 0.15, 0.1, 0.05)
    beam = [Hypothesis(each, math.log(share) - 7) for each, share in zip(labels, shares, strict=True)]
    spans = align_best(logp, beam, 0, boundary)
    assert [span.label for span in spans] == list(labels[0])
    posteriors = [span.posterior for span in spans if span.label != boundary]
    assert posteriors == pytest.approx([0.9, 0.65, 0.95])
    characters = align_best(logp, beam[:2], 0, -1)
    assert [span.posterior for span in characters] == pytest.approx([1.0] * 5)
    assert align_best(logp, [Hypothesis((), -1.0)], 0, boundary) == []
    assert [(s.start, s.end, s.score) for s in spans] == [
        (s.start, s.end, s.score) for s in forced_align(logp, labels[0])
    ]


def test_language_model_scores_of_words_include_their_boundary():
    symbols = PhonemeSet(("<blank>", "|", "a", "i"))
    model = train_ngram([["a", "i", "|", "a"], ["i", "|", "i"]], 2)
    fusion = SymbolFusion(model, symbols, 0.7, 1.0)
    labels = (2, 3, 1, 2)
    spans = align_best(torch.zeros(9, 4).log_softmax(-1), [Hypothesis(labels, -1.0)], 0, 1, fusion)
    first, second = word_features([spans[:2], spans[3:]])
    logps = model.sentence_logp(["a", "i", "|", "a"])
    assert (first.lm, second.lm) == pytest.approx((logps[:3].sum() / 3, logps[3] / 2))
    assert math.isfinite(first.lm) and first.lm < 0


def test_calibration_is_stored_as_json():
    assert Calibration.from_json(json.loads(json.dumps(TRUTH.to_json()))) == TRUTH
    for content in (None, [], {"bias": 1.0}, TRUTH.to_json() | {"mean": "x"}):
        with pytest.raises(CheckpointError, match="bias"):
            Calibration.from_json(content)


def test_confidence_of_text_without_boundaries_is_the_mean_of_its_symbols():
    """Symbols are calibrated one by one, so a long text is not more certain or uncertain than its symbols."""
    symbols = PhonemeSet(("<blank>", "雨", "雪"))
    logps = (-0.1, -0.7, -2.0)
    spans = [Span(1 + i % 2, 2 * i, 2 * i + 1, logp, 0.8 - 0.1 * i) for i, logp in enumerate(logps)]
    (word,) = words_of(spans, symbols, HUBERT, TRUTH)
    expected = [TRUTH.confidence(features) for features in word_features([[span] for span in spans])]
    assert word.kana == "雨雪雨" and len(set(expected)) == 3
    assert word.confidence == pytest.approx(sum(expected) / 3)
    (plain,) = words_of(spans, symbols, HUBERT, None)
    assert plain.confidence == pytest.approx(sum(map(math.exp, logps)) / 3)
    assert list(words_of([], symbols, HUBERT, TRUTH)) == []


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
    assert content["confidence"] == pytest.approx(0.556, abs=1e-3) and content["calibrated"] is False
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
