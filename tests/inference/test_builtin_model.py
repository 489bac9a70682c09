"""Tests of the built-in model: presence, use by default, size, model card and accuracy."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import jahubert
from jahubert.errors import CheckpointError
from jahubert.formats.bundle import save_bundle
from jahubert.formats.hub import builtin_model
from jahubert.inference.confidence import WordFeatures
from jahubert.inference.features import FeatureExtractor, UnitExtractor
from jahubert.inference.transcribe import Transcriber
from jahubert.model.hubert import HubertModel

MODEL = builtin_model()
SETS = (
    "test_low",
    "test_high",
    "test_joined",
    "test_cv",
    "test_cv_phone",
    "test_cv_noise",
    "test_made",
    "test_real",
)
LIMIT = 15_000_000  # maximum size of the model in bytes
CLEAR = ("今日は駅で友達に会いました。", "明日の朝は早く起きます。", "新しい電車で学校へ行く。")


@pytest.fixture(scope="module")
def asr() -> Transcriber:
    return Transcriber.from_pretrained(device="cpu")


def phone_error_rate(references: list[list[str]], transcripts: list[jahubert.Transcript]) -> float:
    from jahubert.train.evaluation.metrics import error_rate

    return error_rate(references, [[p for p in t.phonemes if p != "|"] for t in transcripts]).rate


def test_package_contains_a_small_model():
    assert MODEL is not None and MODEL.parent.parent == Path(jahubert.__file__).parent
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LIMIT


@pytest.mark.parametrize(
    "load",
    [
        jahubert.load_bundle,
        HubertModel.from_pretrained,
        FeatureExtractor.from_pretrained,
        UnitExtractor.from_pretrained,
        Transcriber.from_pretrained,
    ],
)
def test_missing_model_is_reported(load, monkeypatch):
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: None)
    with pytest.raises(CheckpointError, match="no built-in model"):
        load()


def test_features_and_units_use_the_model_by_default():
    wav = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    centroid_layer = jahubert.load_bundle().centroid_layer
    extractor = FeatureExtractor.from_pretrained(layer=centroid_layer, device="cpu")
    features = extractor(wav)
    assert features.equal(FeatureExtractor(HubertModel.from_pretrained(MODEL), centroid_layer)(wav))
    units = UnitExtractor.from_pretrained(device="cpu")
    assert units(wav).equal(units.nearest(features))


def test_message_names_the_model_without_centroids(monkeypatch, tmp_path):
    save_bundle(tmp_path / "plain", model=HubertModel.from_pretrained())
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: tmp_path / "plain")
    for load in (UnitExtractor.from_pretrained, Transcriber.from_pretrained):
        with pytest.raises(CheckpointError, match="the built-in model has no"):
            load()


def test_model_card_is_complete():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for part in (
        "license: cc-by-sa-4.0",
        "Tofugu and WaniKani",
        "Mei",
        "not suitable for",
        "build.py pretrained=... data=...",
        "Tanaka",
    ):
        assert part in card
    info = jahubert.load_bundle(MODEL).info
    # The rows of test sets have the PER in the third column, and those of groups of speakers in the fourth.
    shown = [float(per) for per in re.findall(r"^\| [^|]+ \| \d+ \| (\d+\.\d) \[", card, re.MULTILINE)]
    assert shown == pytest.approx([100 * info["per"][name] for name in SETS], abs=0.06)  # both are rounded
    (all_speakers,) = re.findall(r"^\| all \| 12 \| 246 \| (\d+\.\d) \[", card, re.MULTILINE)
    assert float(all_speakers) == pytest.approx(100 * info["per"]["test_cv"], abs=0.06)


def test_open_jtalk_voice_is_recognized(asr):
    pyopenjtalk = pytest.importorskip("pyopenjtalk")
    from jahubert.train.text.japanese import text_to_phones

    waves = []
    for text in CLEAR:
        wave, rate = pyopenjtalk.tts(text)
        waves.append((np.asarray(wave) / 2**15).astype(np.float32))
    references = [[phone for word in text_to_phones(text) for phone in word] for text in CLEAR]
    assert phone_error_rate(references, list(asr.transcribe_many(waves, rate))) < 0.3


def test_certain_words_in_clean_speech_have_a_high_confidence(asr):
    certain = WordFeatures(mean=0.0, utterance=-0.05, posterior=1.0, lm=-1.5)
    assert asr.calibration.confidence(certain) > 0.9
    for name, value in (("mean", -2.0), ("utterance", -0.6), ("posterior", 0.3), ("lm", -4.0)):
        assert asr.calibration.confidence(certain._replace(**{name: value})) < 0.9


def test_wrong_words_are_less_confident_than_correct_ones(asr):
    """Only the last sentence, which has rare words, is not recognized completely in the noise."""
    pyopenjtalk = pytest.importorskip("pyopenjtalk")
    from jahubert.train.evaluation.metrics import align
    from jahubert.train.text.japanese import text_to_phones

    confidences: dict[tuple[bool, bool], list[float]] = defaultdict(list)
    for text in (*CLEAR, "鷲羽山の蕎麦屋は営業中"):
        wave, rate = pyopenjtalk.tts(text)
        clean_T = (np.asarray(wave) / 2**15).astype(np.float32)
        noise_T = np.random.default_rng(0).standard_normal(len(clean_T)).astype(np.float32)
        for noisy, wav_T in ((False, clean_T), (True, clean_T + 0.15 * noise_T)):
            words = asr.transcribe(wav_T, rate).words
            spoken = [tuple(word) for word in text_to_phones(text)]
            pairs = align(spoken, [word.phonemes for word in words])
            correct = [expected == word for expected, word in pairs if word is not None]
            for word, is_correct in zip(words, correct, strict=True):
                confidences[noisy, is_correct].append(word.confidence)
    clean, noisy, wrong = (np.mean(confidences[key]) for key in ((False, True), (True, True), (True, False)))
    assert clean > 0.9 > noisy > 0.6 and wrong < 0.4


def test_words_of_a_long_recording_are_within_one_sentence(asr, shared_data):
    sentences = [jahubert.load_audio(path) for path in sorted((shared_data / "sentences").glob("*.wav"))]
    pause = torch.zeros(16_000)
    limits, parts, n_samples = [], [], 0
    for wav_T in sentences * 2:
        limits.append((n_samples / 16_000 - 0.5, (n_samples + len(wav_T)) / 16_000 + 0.5))
        parts += [wav_T, pause]
        n_samples += len(wav_T) + len(pause)
    transcript = asr.transcribe(torch.cat(parts))
    assert len(transcript.segments) >= 3
    for word in transcript.words:
        assert any(start <= word.start and word.end <= end for start, end in limits), word


def test_error_rate_on_real_sentences_matches_the_card(asr, shared_data):
    pytest.importorskip("pyopenjtalk")
    from jahubert.train.text.japanese import text_to_phones

    folder = shared_data / "sentences"
    with (folder / "transcripts.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    references = [[phone for word in text_to_phones(row["text"]) for phone in word] for row in rows]
    transcripts = list(asr.transcribe_many(folder / row["file"] for row in rows))
    expected = jahubert.load_bundle(MODEL).info["per"]["test_real"]
    # The tolerance covers bfloat16 and voice activity detection.
    assert phone_error_rate(references, transcripts) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("readme", ["README.md", "README.ja.md"])
def test_readme_shows_the_output_of_the_model(asr, shared_data, readme):
    text = (Path(__file__).parents[2] / readme).read_text(encoding="utf-8")
    shown = dict(re.findall(r"^(\S+\.ogg)\t(\S+)$", text, re.MULTILINE))
    assert len(shown) == 4
    for name, words in shown.items():
        (path,) = (shared_data / "tofugu").rglob(name)
        assert asr.transcribe(path).text == words
