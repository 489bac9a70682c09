"""Japanese text -> words -> katakana pronunciation -> phones, with pyopenjtalk-plus.

A word is a morpheme of its dictionary, except that one whose pronunciation starts with `ー` (the う of
でしょう) belongs to the word before it. Symbols are dropped. Two readings are decided here, so that they do
not depend on what else is installed: 何 is ナン before a counter and before ダ, デ, ナ, ノ and ト, and 言う
is ユー, as in CSJ.
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
from types import ModuleType
from typing import Any

from jahubert.errors import DataError, MissingExtraError
from jahubert.phonemes import kana_to_phones

Feature = Mapping[str, Any]  # a morpheme, as pyopenjtalk's run_frontend returns it

_KANA = re.compile(r"[ァ-ヺー]")
_NO_VOWEL = re.compile(r"[ッー]+")
_NAN_BEFORE = re.compile(r"[ダデナノト]")


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


def analyse(text: str) -> list[dict[str, Any]]:
    """Morphemes of a text as pyopenjtalk gives them, with the readings decided here; it makes labels of them.

    DataError names letters that have no reading.
    """
    plain = "".join(
        " " if unicodedata.category(c)[0] in "CZ" else c for c in unicodedata.normalize("NFKC", text)
    )
    features = [dict(feature) for feature in openjtalk().run_frontend(plain, predict_nani=False)]
    for feature, following in zip_longest(features, features[1:]):
        if not _KANA.search(feature["pron"]):
            letters = [c for c in feature["string"] if unicodedata.category(c)[0] in "LN"]
            if letters:
                raise DataError(f"no reading for {''.join(letters)!r} in the text {text!r}: spell it in kana")
        _decide(feature, following)
    return features


def _decide(feature: dict[str, Any], following: Feature | None) -> None:
    string, pron = feature["string"], feature["pron"]
    if pron == "ナニ" and string == "何" and following is not None:
        counts = (
            "助数詞" in (following["pos_group2"], following["pos_group3"]) or following["pos_group1"] == "数"
        )
        if counts or (following["pos"] in ("助詞", "助動詞") and _NAN_BEFORE.match(following["pron"])):
            feature["pron"] = "ナン"
    elif pron.endswith("イウ") and string.endswith(("言う", "いう", "云う")):
        feature["pron"] = pron[:-2] + "ユー"


def words_of(features: Sequence[Feature]) -> list[Word]:
    """Words of the morphemes that `analyse` returns, in order; may be empty."""
    words: list[tuple[str, str]] = []
    joined = False  # whether the morpheme before this one was a word, with no symbol between
    for feature in features:
        kana = "".join(_KANA.findall(feature["pron"]))
        if not kana:
            joined = False
            continue
        if joined and (kana.startswith("ー") or _NO_VOWEL.fullmatch(kana)):
            surface, before = words[-1]
            words[-1] = (surface + feature["string"], before + kana)
        elif kana := kana.lstrip("ー"):
            if _NO_VOWEL.fullmatch(kana):
                continue
            words.append((feature["string"], kana))
            joined = True
    return [Word(surface, kana, tuple(kana_to_phones(kana))) for surface, kana in words]


def text_to_words(text: str) -> list[Word]:
    """Words of a Japanese text. DataError when it has none, or letters that cannot be read."""
    words = words_of(analyse(text))
    if not words:
        raise DataError(f"nothing to read in the text {text!r}")
    return words


def text_to_phones(text: str) -> tuple[tuple[str, ...], ...]:
    """Words of a Japanese text as phones: what `Utterance.words` holds. DataError as in `text_to_words`."""
    return tuple(word.phones for word in text_to_words(text))
