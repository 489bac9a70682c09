"""The model inside the package: it is there, small, says what it is, and understands what it should."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

import jahubert
from jahubert.inference.transcribe import Transcriber, builtin_model

MODEL = builtin_model()
SETS = ("test_low", "test_high", "test_joined", "test_made", "test_real")
LIMIT = 15_000_000  # bytes in the wheel


@pytest.fixture(scope="module")
def asr() -> Transcriber:
    return Transcriber.from_pretrained(device="cpu")


def phone_error_rate(said: list[list[str]], heard: list[jahubert.Transcript]) -> float:
    from jahubert.train.evaluation.metrics import error_rate

    return error_rate(said, [[p for p in found.phonemes if p != "|"] for found in heard]).rate


def test_it_is_in_the_package_and_small():
    assert MODEL is not None and MODEL.parent.parent == Path(jahubert.__file__).parent
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LIMIT


def test_its_card_says_what_it_is():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for part in ("license: cc-by-sa-4.0", "Tofugu and WaniKani", "Mei", "not good for", "build.py data=..."):
        assert part in card
    info = jahubert.load_bundle(MODEL).info
    rows = [line for line in card.splitlines() if re.search(r"\[\d+\.\d, \d+\.\d\]", line)]
    assert [row.split("|")[3].split()[0] for row in rows] == [
        f"{100 * info['per'][name]:.1f}" for name in SETS
    ]


def test_it_understands_the_voice_of_open_jtalk(asr):
    pyopenjtalk = pytest.importorskip("pyopenjtalk")
    from jahubert.train.text.japanese import text_to_phones

    texts = ("今日は駅で友達に会いました。", "明日の朝は早く起きます。", "新しい電車で学校へ行く。")
    waves = []
    for text in texts:
        wave, rate = pyopenjtalk.tts(text)
        waves.append((np.asarray(wave) / 2**15).astype(np.float32))
    said = [[phone for word in text_to_phones(text) for phone in word] for text in texts]
    assert phone_error_rate(said, list(asr.transcribe_many(waves, rate))) < 0.3


def test_the_card_tells_the_truth_about_real_sentences(asr, shared_data):
    pytest.importorskip("pyopenjtalk")
    from jahubert.train.text.japanese import text_to_phones

    folder = shared_data / "sentences"
    with (folder / "transcripts.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    said = [[phone for word in text_to_phones(row["text"]) for phone in word] for row in rows]
    heard = list(asr.transcribe_many(folder / row["file"] for row in rows))
    told = jahubert.load_bundle(MODEL).info["per"]["test_real"]
    assert phone_error_rate(said, heard) == pytest.approx(told, abs=0.03)  # bfloat16, and where it listens
