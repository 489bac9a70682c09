"""Japanese text to words, katakana pronunciations and phones, with pyopenjtalk-plus.

A word is a morpheme of its dictionary, except that a morpheme pronounced with an initial `ー` (the う of
でしょう) is joined to the preceding word. Symbols are dropped. Known errors of the dictionary are corrected
before and after the analysis:

- `normalize_text` spells out what the dictionary skips or misreads: minus signs, currencies, units, clock
  times, dates and fractions;
- `user_dictionary.py` corrects single words and adds a user's own;
- `_fix_reading` fixes readings that depend on the context or on installed packages: 何 is ナン before a
  counter and before ダ, デ, ナ, ノ and ト; 言う is ユー, as in CSJ; ユウ and ュウ are ユー and ュー.

Latin letters have their broadcast names, also inside words: エー, ケー and ジェー, since [ei] is a long vowel
(NHK's committee on language, no. 1388, 2015), but エイチ, as in NHK's own name. docs/readings.md lists the
remaining errors.
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

from jahubert.errors import DataError, MissingExtraError
from jahubert.phonemes import kana_to_phones
from jahubert.train.text.user_dictionary import dictionary

Feature = Mapping[str, Any]  # a morpheme, as pyopenjtalk's run_frontend returns it

_KANA = re.compile(r"[ァ-ヺー]")
_NO_VOWEL = re.compile(r"[ッー]+")
_YUU = re.compile("([ユュ])ウ")
_NAN_BEFORE = re.compile(r"[ダデナノト]")
_LATIN = re.compile(r"[Ａ-Ｚａ-ｚ]")
_SMALL_VOWELS = (
    "ァィゥェォぁぃぅぇぉ"  # which the analyser sometimes takes for a word of their own: ツ and ァ
)

# Signs that are one character each, before NFKC takes them apart (℃ would become the letter C).
_SIGNS = {"℃": "度", "㎏": "キログラム", "㎎": "ミリグラム", "㎞": "キロメートル", "㎝": "センチメートル"}
_SIGNS |= {"ヷ": "ヴァ", "ヸ": "ヴィ", "ヹ": "ヴェ", "ヺ": "ヴォ"}
_SIGNS |= {"㎜": "ミリメートル", "㎡": "平方メートル", "㎥": "立方メートル", "㏄": "シーシー", "〜": "～"}
_ROMAN = re.compile(r"([Ⅰ-ⅿ]+)")  # numerals, which the analyser reads as numbers and NFKC makes letters of
_CLOCK = r"(?<![\d:])(2[0-4]|[01]?\d):(?=[0-5]\d)"
_AMOUNT = r"(\d[\d,]*(?:\.\d+)?)"
_RESPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![A-Za-z0-9.)\]-])[-\u2212](?=\d)", "マイナス"),
        (r"°C", "度"),
        (r"[¥￥]" + _AMOUNT, r"\1円"),
        (r"\$" + _AMOUNT, r"\1ドル"),
        (r"€" + _AMOUNT, r"\1ユーロ"),
        (r"£" + _AMOUNT, r"\1ポンド"),
        (r"(\d+)\u2044(\d+)", r"\2分の\1"),
        (r"(?<![\d/])(\d{4})/(1[0-2]|0?[1-9])/(3[01]|[12]\d|0?[1-9])(?![\d/])", r"\1年\2月\3日"),
        # A clock has two digits of minutes; 2:1 is a score or a ratio, two to one.
        (_CLOCK + r"00(?![\d:])", r"\1時"),
        (_CLOCK + r"0?([1-5]?\d)(?![\d:])", r"\1時\2分"),
        (r"(?<![\d:.])(\d+(?:\.\d+)?)[:対](?=\d+(?![\d:]))", r"\1タイ"),
        (r"(?<=\d)[~～](?=\d)", "から"),
        (r"(?<=[A-Za-z])#", "シャープ"),
        (r"年0(?=\d月)", "年"),
        (r"月0(?=\d日)", "月"),
    )
)


@dataclass(frozen=True)
class Word:
    """A word: as it was written, as it is said (katakana), and the phones of that."""

    surface: str
    kana: str
    phones: tuple[str, ...]


@cache
def openjtalk() -> ModuleType:
    """The pyopenjtalk module, imported without the notices that it prints; MissingExtraError without it."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import pyopenjtalk
    except ImportError as error:
        raise MissingExtraError("pyopenjtalk-plus", "train") from error
    return pyopenjtalk


def normalize_text(text: str) -> str:
    """The text in NFKC, with signs that the dictionary would skip or misread written out, in one line.

    Roman numerals stay as they are, Latin letters lose their accents, control characters become spaces.
    """
    text = "".join(_SIGNS.get(char, char) for char in unicodedata.normalize("NFC", text))
    parts = _ROMAN.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    text = "".join(_plain(char) for char in "".join(parts))
    for pattern, replacement in _RESPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _plain(char: str) -> str:
    if unicodedata.category(char)[0] in "CZ":
        return " "
    base = unicodedata.normalize("NFD", char)[0]
    return base if base.isascii() else char


def analyze(text: str, words: Path | None = None) -> list[dict[str, Any]]:
    """Morphemes of a text as pyopenjtalk gives them, with the readings decided here; it makes labels of them.

    `words` is a user dictionary (`readings.dictionary`). DataError names letters that have no reading.
    """
    pyopenjtalk = openjtalk()
    plain = normalize_text(text)
    found = pyopenjtalk.run_frontend(plain, predict_nani=False, jtalk=dictionary(words))
    features = [dict(feature) for feature in found]
    for feature, following in zip_longest(features, features[1:]):
        if not _KANA.search(feature["pron"]):
            letters = [c for c in feature["string"] if unicodedata.category(c)[0] in "LN"]
            if letters:
                raise DataError(f"no reading for {''.join(letters)!r} in the text {text!r}: spell it in kana")
        _fix_reading(feature, following)
    return features


def _fix_reading(feature: dict[str, Any], following: Feature | None) -> None:
    string, pron = feature["string"], feature["pron"]
    if pron == "ナニ" and string == "何" and following is not None:
        counts = (
            "助数詞" in (following["pos_group2"], following["pos_group3"]) or following["pos_group1"] == "数"
        )
        if counts or (following["pos"] in ("助詞", "助動詞") and _NAN_BEFORE.match(following["pron"])):
            feature["pron"] = "ナン"
    elif _LATIN.search(string):
        feature["pron"] = _letter_names(string, pron)
    elif _YUU.search(pron):
        feature["pron"] = _YUU.sub(r"\1ー", pron)
    elif pron.endswith("イウ") and string.endswith(("言う", "いう", "云う")):
        feature["pron"] = pron[:-2] + "ユー"


def _letter_names(string: str, pron: str) -> str:
    """The pronunciation of a word with Latin letters, with each letter by one name wherever it stands."""
    pron = re.sub("(ジェ|ケ)イ", r"\1ー", pron)
    if not re.search("[Ｈｈ]", string):
        return pron.replace("エイ", "エー")
    return re.sub("エイ(?!’?チ)", "エー", pron.replace("エッチ", "エイチ"))


def features_to_words(features: Sequence[Feature]) -> list[Word]:
    """Words of the morphemes that `analyze` returns, in order; may be empty."""
    words: list[tuple[str, str]] = []
    joined = False  # whether the morpheme before this one was a word, with no symbol between
    for feature in features:
        kana = "".join(_KANA.findall(feature["pron"]))
        if not kana:
            joined = False
            continue
        if joined and feature["string"][0] in _SMALL_VOWELS:  # said as large ones where they stand alone
            kana = _leaning(words[-1][1], feature["string"][0]) + kana[1:]
        if joined and (kana[0] in "ー" + _SMALL_VOWELS or _NO_VOWEL.fullmatch(kana)):
            surface, before = words[-1]
            words[-1] = (surface + feature["string"], before + kana)
        elif kana := kana.lstrip("ー"):
            if _NO_VOWEL.fullmatch(kana):
                continue
            words.append((feature["string"], kana))
            joined = True
    return [Word(surface, kana, tuple(kana_to_phones(kana))) for surface, kana in words]


def _leaning(before: str, small: str) -> str:
    """A small vowel behind a word: itself, as in ツァ; ー where it draws out a vowel, as in うわぁ."""
    return "ー" if kana_to_phones(before)[-1].removesuffix(":") == kana_to_phones(small)[0] else small


def text_to_words(text: str, words: Path | None = None) -> list[Word]:
    """Words of a Japanese text; `words` is a user dictionary.

    Raises:
        DataError: the text has no words, or letters that cannot be read.
    """
    found = features_to_words(analyze(text, words))
    if not found:
        raise DataError(f"nothing to read in the text {text!r}")
    return found


def text_to_phones(text: str) -> tuple[tuple[str, ...], ...]:
    """Words of a Japanese text as phones: what `Utterance.words` holds. DataError as in `text_to_words`."""
    return tuple(word.phones for word in text_to_words(text))
