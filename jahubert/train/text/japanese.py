"""Conversion of Japanese text to words, katakana pronunciations and phones, based on pyopenjtalk-plus.

Each morpheme becomes a word, except that a morpheme whose pronunciation starts with `ー` or a small vowel, or
has no vowel, is joined to the preceding word (such as う in でしょう). Symbols are dropped. Many errors
in the dictionary of pyopenjtalk-plus are corrected before, during and after the analysis:

- `normalization.py` spells out expressions that the dictionary skips or misreads: minus signs, currencies,
  units, clock times, dates and fractions;
- `user_dictionary.py` corrects single words and adds the user's own words;
- `_fix_reading` corrects readings that depend on the context or on installed packages: 何 is read ナン before
  counters, numbers, and particles and auxiliary verbs that start with ダ, デ, ナ, ノ, ト or テ; 言う is
  read ユー, as in CSJ; ユウ and ュウ become ユー and ュー.

Latin letters, also those inside words, have the names used in broadcasting: エー, ケー and ジェー, because
[ei] is read as a long vowel (NHK's committee on language, no. 1388, 2015), but エイチ, as in the name of NHK.
docs/readings.md lists known errors that remain.
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from jahubert.errors import DataError, MissingExtraError, quote
from jahubert.phonemes import kana_to_phones
from jahubert.train.text.normalization import normalize_text
from jahubert.train.text.user_dictionary import dictionary, kept_words

Feature = Mapping[str, Any]  # a morpheme in the format of pyopenjtalk.run_frontend

_KANA = re.compile(r"[ァ-ヺー]")
_NO_VOWEL = re.compile(r"[ッー]+")
_YUU = re.compile("([ユュ])ウ")
_NAN_BEFORE = re.compile(r"[ダデナノトテ]")
_LATIN = re.compile(r"[Ａ-Ｚａ-ｚ]")
# The analyzer sometimes splits off small vowels as separate words, for example ツァ into ツ and ァ.
_SMALL_VOWELS = "ァィゥェォぁぃぅぇぉ"


@dataclass(frozen=True)
class Word:
    """A word: its spelling, its pronunciation in katakana, and its phones."""

    surface: str
    kana: str
    phones: tuple[str, ...]


@cache
def openjtalk() -> ModuleType:
    """Import pyopenjtalk, and suppress the messages that it prints.

    Raises:
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import pyopenjtalk
    except ImportError as error:
        raise MissingExtraError("pyopenjtalk-plus", "train") from error
    return pyopenjtalk


def analyze(text: str, words: Path | None = None) -> list[dict[str, Any]]:
    """Split a text into morphemes with corrected readings, in the format of pyopenjtalk.run_frontend.

    Args:
        text: any Japanese text.
        words: path of a user dictionary (see `user_dictionary.read_words`).

    Raises:
        DataError: the dictionary has no reading for some letters, the text is too long, or the user
            dictionary is invalid.
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    pyopenjtalk = openjtalk()
    normalized = normalize_text(text, kept_words(words))
    try:
        morphemes = pyopenjtalk.run_frontend(normalized, predict_nani=False, jtalk=dictionary(words))
    except RuntimeError as error:  # the buffers of the analyzer have a fixed size
        raise DataError(f"pyopenjtalk cannot analyze the text {quote(text)}: {error}") from error
    features = [dict(morpheme) for morpheme in morphemes]
    for feature, following in zip_longest(features, features[1:]):
        if not _KANA.search(feature["pron"]):
            letters = [c for c in feature["string"] if unicodedata.category(c)[0] in "LN"]
            if letters:
                raise DataError(
                    f"no reading for {quote(''.join(letters))} in the text {quote(text)}; spell it in kana"
                )
        _fix_reading(feature, following)
    return features


def _fix_reading(feature: dict[str, Any], following: Feature | None) -> None:
    string, pron = feature["string"], feature["pron"]
    if pron == "ナニ" and string == "何" and following is not None:
        is_counter = (
            "助数詞" in (following["pos_group2"], following["pos_group3"]) or following["pos_group1"] == "数"
        )
        if is_counter or (following["pos"] in ("助詞", "助動詞") and _NAN_BEFORE.match(following["pron"])):
            feature["pron"] = "ナン"
    elif _LATIN.search(string):
        feature["pron"] = _letter_names(string, pron)
    elif _YUU.search(pron):
        feature["pron"] = _YUU.sub(r"\1ー", pron)
    elif pron.endswith("イウ") and string.endswith(("言う", "いう", "云う")):
        feature["pron"] = pron[:-2] + "ユー"


def _letter_names(string: str, pron: str) -> str:
    """Normalize the pronunciation of a word with Latin letters, so that each letter has only one name."""
    pron = re.sub("(ジェ|ケ)イ", r"\1ー", pron)
    if not re.search("[Ｈｈ]", string):
        return pron.replace("エイ", "エー")
    return re.sub("エイ(?!’?チ)", "エー", pron.replace("エッチ", "エイチ"))


def features_to_words(features: Sequence[Feature]) -> list[Word]:
    """Join the morphemes returned by `analyze` into words. The result may be empty."""
    words: list[tuple[str, str]] = []
    joined = False  # whether the previous morpheme is part of a word rather than a symbol
    for feature in features:
        kana = "".join(_KANA.findall(feature["pron"]))
        if not kana:
            joined = False
            continue
        if joined and feature["string"][0] in _SMALL_VOWELS:  # the analyzer reads it as a full-size vowel
            kana = _small_vowel_reading(words[-1][1], feature["string"][0]) + kana[1:]
        if joined and (kana[0] in "ー" + _SMALL_VOWELS or _NO_VOWEL.fullmatch(kana)):
            surface, before = words[-1]
            words[-1] = (surface + feature["string"], before + kana)
        elif kana := kana.lstrip("ー"):
            if _NO_VOWEL.fullmatch(kana):
                continue
            words.append((feature["string"], kana))
            joined = True
    return [Word(surface, kana, tuple(kana_to_phones(kana))) for surface, kana in words]


def _small_vowel_reading(preceding: str, small: str) -> str:
    """Return the reading of a small vowel: ー if it lengthens a vowel (うわぁ), otherwise itself (ツァ)."""
    return "ー" if kana_to_phones(preceding)[-1].removesuffix(":") == kana_to_phones(small)[0] else small


def text_to_words(text: str, words: Path | None = None) -> list[Word]:
    """Convert a Japanese text to words.

    Args:
        text: any Japanese text.
        words: path of a user dictionary (see `user_dictionary.read_words`).

    Raises:
        DataError: the text has no words, has letters without a reading or is too long, or the user dictionary
            is invalid.
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    result = features_to_words(analyze(text, words))
    if not result:
        raise DataError(f"no words in the text {quote(text)}")
    return result


def text_to_phones(text: str) -> tuple[tuple[str, ...], ...]:
    """Convert a Japanese text to the phones of its words, in the format of `Utterance.words`.

    Raises:
        DataError: the text has no words, has letters without a reading or is too long.
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    return tuple(word.phones for word in text_to_words(text))
