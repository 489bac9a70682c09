"""Normalization of Japanese text before morphological analysis.

The module spells out expressions that the dictionary of pyopenjtalk-plus skips or misreads. Groups of rules
are applied in this order: hyphens, ordinals and versions, numeric dates, clock times, phone numbers and
addresses, fractions, ratios and scores, long vowels, ranges, signs and arithmetic, currencies, units, and
internet addresses. Numbers with counters need no rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from math import gcd

# Replacements before NFKC, which would decompose some of these signs (℃ to ° and the letter C).
_SIGNS = {
    **{"℃": "度", "㎏": "キログラム", "㎎": "ミリグラム", "㎞": "キロメートル", "㎝": "センチメートル"},
    **{"㎜": "ミリメートル", "㎡": "平方メートル", "㎥": "立方メートル", "㏄": "シーシー", "ℓ": "L"},
    **{
        "〜": "～",
        "–": "-",
        "‐": "-",
        "‑": "-",
        "№": "ナンバー",
        "≠": "ノットイコール",
        "㈱": "株式会社",
        "㈲": "有限会社",
        "±": "プラスマイナス",
    },
    **{"½": "2分の1", "⅓": "3分の1", "⅔": "3分の2", "¼": "4分の1", "¾": "4分の3"},
    **{"ヷ": "ヴァ", "ヸ": "ヴィ", "ヹ": "ヴェ", "ヺ": "ヴォ"},
}
# Exponents, which NFKC would turn into additional digits of a number.
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_EXPONENT = re.compile(r"(?<=[\dA-Za-z)])([⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
# Private-use characters that stand for the words that `normalize_text` keeps.
_FIRST_HELD = 0xF0000
_HELD = re.compile(f"[{chr(_FIRST_HELD)}-{chr(0x10FFFF)}]")
# Positions between circled digits, which NFKC would turn into the digits of one number.
_CIRCLED = re.compile(r"(?<=[①-⑳])(?=[①-⑳\d])|(?<=\d)(?=[①-⑳])")
_METERS = re.compile(r"(?<=\d)([kcm]?)m([²³]|[23](?![\dA-Za-z]))")
# The analyzer reads Roman numerals as numbers. They are excluded from NFKC, which would yield letters.
_ROMAN = re.compile(r"([Ⅰ-ⅿ]+)")
_DIGIT_NAMES = ("ゼロ", "イチ", "ニー", "サン", "ヨン", "ゴー", "ロク", "ナナ", "ハチ", "キュー")

_MAX_DIGITS = 15  # longer digit strings are not converted to integers
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_MONTH, _DAY = r"(?:1[0-2]|0?[1-9])", r"(?:3[01]|[12]\d|0?[1-9])"
_CLOCK = r"(?<![\d:])(2[0-4]|[01]?\d):"
_WEEKDAYS = {"月": "ゲツ", "火": "カ", "水": "スイ", "木": "モク", "金": "キン", "土": "ド", "日": "ニチ"}
_WEEKDAY = "[月火水木金土日]"
_COUNTER = "(?:[人年月日時分秒個回本枚歳代円点台度匹週名割倍話章巻杯泊%]|[かヶカケ]月|[kcm]?m|k?g|L)"
_PREFIXES = {"": "", "k": "キロ", "c": "センチ", "m": "ミリ", "d": "デシ"}
_BYTES = {"K": "キロ", "M": "メガ", "G": "ギガ", "T": "テラ"}
_SUBTITLE = r"[^~、。\s]*~(?:[\s、。」』!?)]|$)"  # a subtitle between wave dashes: 夏~想い出~


def _digits(match: re.Match[str]) -> str:
    """Spell out a phone number or postal code digit by digit, reading hyphens as の."""
    return "".join("ノ" if char == "-" else _DIGIT_NAMES[int(char)] for char in match[0])


def _slash(match: re.Match[str]) -> str:
    """Spell out a date (11/3) or a fraction (1/2, 1/100)."""
    if max(len(match[1]), len(match[2])) > _MAX_DIGITS:
        return match[0]
    first, second = int(match[1]), int(match[2])
    is_date = 1 <= first <= 12 and 1 <= second <= 31
    is_reduced = first < second and gcd(first, second) == 1
    if match[3] or (is_date and not (is_reduced and second <= 10)):
        return f"{first}月{second}日{match[3] or ''}" if is_date else match[0]
    return f"{second}分の{first}" if is_reduced else match[0]


def _hyphen(match: re.Match[str]) -> str:
    """Spell out a hyphen between two numbers, that is, in a range, figure number, address or score."""
    before, first, second, after = match.groups()
    is_short = max(len(first), len(second)) <= _MAX_DIGITS
    if re.match(_COUNTER, after) and is_short and int(first) < int(second):
        return f"{before}{first}から{second}"
    is_numbering = re.match("[図表式章節問例]|丁目", before)
    # Numbers after a name are an address (銀座4-5), unless a name follows (日本2-1韓国) or the word before
    # the numbers refers to a result (前半, 結果).
    is_name = re.match("(?![半戦合果点])[一-龠ァ-ヺー]", before)
    if is_numbering or (is_name and not re.match("[一-龠ァ-ヺ]", after)):
        return f"{before}{first}の{second}"
    return f"{before}{'イッ' if first == '1' else first}タイ{second}"


def _square_meters(match: re.Match[str]) -> str:
    return ("平方" if match[2] in "²2" else "立方") + _PREFIXES[match[1]] + "メートル"


def _weekdays(match: re.Match[str]) -> str:
    return f"{_WEEKDAYS[match[1]]}から{_WEEKDAYS[match[2]]}"


_Replacement = str | Callable[[re.Match[str]], str]
_RULES: tuple[tuple[str, tuple[tuple[str, _Replacement], ...]], ...] = (
    (
        "hyphens, ordinals and versions",
        (
            (r"(?<=\d)\u2212(?=\d)", "-"),
            (r"(?<![A-Za-z\d])1st(?![A-Za-z])", "ファースト"),
            (r"(?<![A-Za-z\d])3rd(?![A-Za-z])", "サード"),
            (r"(?<![A-Za-z])[Vv]er\.? ?(?=\d)", "バージョン"),
        ),
    ),
    (
        "dates",
        (
            (rf"(?<![\d/])(\d{{4}})/({_MONTH})/({_DAY})(?![\d/])", r"\1年\2月\3日"),
            (rf"(?<![\d-])(\d{{4}})-({_MONTH})-({_DAY})(?![\d-])", r"\1年\2月\3日"),
            (rf"(?<![\d.])(\d{{4}})\.({_MONTH})\.({_DAY})(?![\d.])", r"\1年\2月\3日"),
            (r"(?<![\d.])(\d+)\.(\d+)\.(\d+)(?![\d.])", r"\1点\2点\3"),  # versions
            (r"年0(?=\d月)", "年"),
            (r"月0(?=\d日)", "月"),
        ),
    ),
    (
        "clock times",  # minutes must have two digits; otherwise the numbers are a score or a ratio
        (
            (r"(?<![\d:])(\d{1,2}):([0-5]\d):([0-5]\d)(?![\d:])", r"\1時間\2分\3秒"),
            (_CLOCK + r"00(?![\d:])", r"\1時"),
            (_CLOCK + r"0?([1-5]?\d)(?<=:[0-5]\d)(?![\d:])", r"\1時\2分"),
            (r"(?<![\d.])0(?=\d[時分秒])", ""),
            (r"(?<=間)0(?=\d分)|(?<=分)0(?=\d秒)", ""),
            (r"(?<![\d.])0時(?!間)", "零時"),
        ),
    ),
    (
        "phone numbers and addresses",
        (
            (r"(?<![\d-])0\d{1,4}-\d{1,4}-\d{3,4}(?![\d-])", _digits),
            (r"(?<![\d-])\d{3}-\d{4}(?![\d-])", _digits),  # postal codes
            (r"(?<![\d-])\d{1,3}(?:-\d{1,4}){2,3}(?![\d-])", lambda match: match[0].replace("-", "の")),
        ),
    ),
    (
        "fractions",
        (
            (r"(\d+)\u2044(\d+)", r"\2分の\1"),
            (rf"(?<![\d/.])(\d{{1,4}})/(\d{{1,4}})(\({_WEEKDAY}\))?(?![\d/.])", _slash),
        ),
    ),
    (
        "ratios and scores",
        (
            (
                r"(?<![A-Za-z\d.,/:-])(丁目|[^\W\d]|)(0|[1-9]\d{0,3})-(0|[1-9]\d{0,3})"
                r"(?![\d.,/:=-]|[A-Za-z]{3})(?=(.{0,2}))",
                _hyphen,
            ),
            (r"(?<![\d:.])1[:対](?=\d+(?:\.\d+)?(?![\d:]))", "イッタイ"),
            (r"(?<![\d:.])(\d+(?:\.\d+)?)[:対](?=\d+(?:\.\d+)?(?![\d:]))", r"\1タイ"),
        ),
    ),
    (
        # A wave dash between hiragana (は~い), or after an interjection (え~) or a final particle (ね~)
        "long vowels",
        (
            (rf"(?<=[ぁ-ん])(?<!から)[~～]+(?=[ぁ-ん])(?!{_SUBTITLE})", "ー"),
            (r"(?<![ぁ-んァ-ヺ一-龠々ー])([ぁ-ん])[~～]+(?=[\s、。!?」』]|$)", r"\1ー"),
            (r"(?<=[ねよなわさ])[~～]+(?=[\s、。!?」』]|$)", "ー"),
        ),
    ),
    (
        "ranges",
        (
            (r"(?<=\d)[~～](?=\d)|(?<=\d[年月日時分人円])-(?=\d)", "から"),
            (r"(?<![A-Za-z])([A-Z])~(?=[A-Z](?![A-Za-z]))", r"\1から"),
            (r"(\d[^\d\s~、。ぁ-んA-Za-z]{1,3})~(?=[\s、。)」]|です|の|$)", r"\1から"),  # 18歳~
            # Ranges that start with a number and its unit: 20%～30%, 10時～12時.
            (r"(\d[^\d\s~～、。ぁ-ん]{1,6})[~～](?=第?\d)", r"\1から"),
            (rf"(?<![一-龠])({_WEEKDAY})[~～]({_WEEKDAY})(?![一-龠])", _weekdays),
            (rf"(?<=曜)[~～](?={_WEEKDAY})|(?<=曜日)[~～](?={_WEEKDAY})", "から"),
            (rf"(?<=[一-龠々ァ-ヺ])~(?=[一-龠ァ-ヺ])(?!{_SUBTITLE})", "から"),  # 東京~大阪, 午前9時~午後5時
        ),
    ),
    (
        "arithmetic and signs",
        (
            (r"(?<=\d)-(?=\d+=)", "引く"),
            (r"(?<=\d)x(?=\d)", "×"),
            (r"(?<=[\dA-Za-z)])=(?=[\dA-Za-z(-])", "イコール"),
            (r"(?<![A-Za-z0-9.)\]-])[-\u2212](?=\d)", "マイナス"),
            (r"[▲△](?=\d+(?:\.\d+)?%)", "マイナス"),
            (r"(?<![A-Za-z0-9.)\]+])\+(?=\d)", "プラス"),
            (r"(?<=[A-Za-z])#", "シャープ"),
            (r"(?<![A-Za-z])#(?=\d)", "ナンバー"),
        ),
    ),
    (
        "currencies",
        tuple((sign + rf"({_NUMBER})", rf"\1{name}") for sign, name in (
            ("[¥￥]", "円"), (r"\$", "ドル"), ("€", "ユーロ"), ("£", "ポンド")
        )),
    ),
    (
        "units",
        (
            (r"°C?", "度"),
            (r"(?<=\d)([md]?)[Ll](?![A-Za-z])", lambda match: f"{_PREFIXES[match[1]]}リットル"),
            (r"(?<=\d)km/h", "キロ"),
            (r"(?<=\d)h(?![A-Za-z])", "時間"),
            (r"(?<=\d)([KMGT])B(?![A-Za-z])", lambda match: f"{_BYTES[match[1]]}バイト"),
            (r"(?<=\d)ft(?![A-Za-z])", "フィート"),
            (r"(?<![A-Za-z\d])(H|O|N|NO|SO)2(?=O?(?![A-Za-z\d]))", r"\1ツー"),
        ),
    ),
    (
        "internet addresses",
        ((r"(?<=[a-z0-9])\.(?=[a-z]{2,})", "ドット"), (r"(?<=[A-Za-z0-9])@(?=[A-Za-z0-9])", "アットマーク")),
    ),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), new) for _, rules in _RULES for pattern, new in rules]


def normalize_text(text: str, kept: re.Pattern[str] | None = None) -> str:
    """Apply NFKC and spell out expressions that pyopenjtalk-plus would skip or misread.

    NFKC is not applied to the Unicode characters for Roman numerals. Accents are removed from Latin letters,
    control characters become spaces, and invisible format characters are removed.

    Args:
        kept: pattern for words to which only NFKC is applied.
    """
    text = _HELD.sub(" ", unicodedata.normalize("NFC", text))
    words: list[str] = []

    def hold(match: re.Match[str]) -> str:
        words.append(unicodedata.normalize("NFKC", match[0]))
        return chr(_FIRST_HELD + len(words) - 1)

    if kept is not None:
        text = kept.sub(hold, text)
    text = _CIRCLED.sub(" ", text)
    text = "".join(_SIGNS.get(char, char) for char in text)
    text = _METERS.sub(_square_meters, text)
    text = _EXPONENT.sub(lambda match: f"の{match[1].translate(_SUPERSCRIPTS)}乗", text)
    parts = _ROMAN.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    text = "".join(_simplify(char) for char in "".join(parts))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return _HELD.sub(lambda match: words[ord(match[0]) - _FIRST_HELD], text)


def _simplify(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":  # such as a zero-width space or a soft hyphen
        return ""
    if category[0] in "CZ" and not _HELD.match(char):
        return " "
    base = unicodedata.normalize("NFD", char)[0]
    return base if base.isascii() and base.isalnum() else char


def is_punctuation(symbol: str) -> bool:
    """Return whether a symbol is a punctuation mark. Symbols with a longer name, such as `<unk>`, are not."""
    return len(symbol) == 1 and unicodedata.category(symbol)[0] == "P"


def recognized_characters(text: str, punctuation: bool = False) -> str:
    """Return the characters that a character recognizer should output for a text, in NFKC, without spaces.

    Args:
        punctuation: whether to keep punctuation marks in addition to letters and digits. Symbols such as `+`
            are always dropped.
    """
    kept = "LNP" if punctuation else "LN"
    return "".join(
        char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char)[0] in kept
    )
