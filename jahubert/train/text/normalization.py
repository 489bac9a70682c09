"""Normalization of Japanese text before morphological analysis.

Spells out what the dictionary of pyopenjtalk-plus skips or misreads: minus signs, currencies, units, clock
times, dates, ratios and fractions.
"""

from __future__ import annotations

import re
import unicodedata

# Single-character signs, replaced before NFKC decomposes them (℃ would become the letter C).
_SIGNS = {"℃": "度", "㎏": "キログラム", "㎎": "ミリグラム", "㎞": "キロメートル", "㎝": "センチメートル"}
_SIGNS |= {"ヷ": "ヴァ", "ヸ": "ヴィ", "ヹ": "ヴェ", "ヺ": "ヴォ"}
_SIGNS |= {"㎜": "ミリメートル", "㎡": "平方メートル", "㎥": "立方メートル", "㏄": "シーシー", "〜": "～"}
_ROMAN = re.compile(
    r"([Ⅰ-ⅿ]+)"
)  # numerals: the analyzer reads them as numbers, but NFKC turns them into letters
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
        # Clock times have two digits for the minutes; other pairs are scores or ratios (2:1, two to one).
        (_CLOCK + r"00(?![\d:])", r"\1時"),
        (_CLOCK + r"0?([1-5]?\d)(?![\d:])", r"\1時\2分"),
        (r"(?<![\d:.])(\d+(?:\.\d+)?)[:対](?=\d+(?![\d:]))", r"\1タイ"),
        (r"(?<=\d)[~～](?=\d)", "から"),
        (r"(?<=[A-Za-z])#", "シャープ"),
        (r"年0(?=\d月)", "年"),
        (r"月0(?=\d日)", "月"),
    )
)


def normalize_text(text: str) -> str:
    """Apply NFKC and spell out signs that the dictionary would skip or misread.

    Roman numerals are kept, Latin letters lose their accents, control characters become spaces.
    """
    text = "".join(_SIGNS.get(char, char) for char in unicodedata.normalize("NFC", text))
    parts = _ROMAN.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    text = "".join(_simplify(char) for char in "".join(parts))
    for pattern, replacement in _RESPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _simplify(char: str) -> str:
    if unicodedata.category(char)[0] in "CZ":
        return " "
    base = unicodedata.normalize("NFD", char)[0]
    return base if base.isascii() else char
