"""User dictionary: corrections to the dictionary of pyopenjtalk-plus, and the user's own words.

Both are compiled (3 ms) into one MeCab user dictionary. Corrected words are therefore also segmented
correctly: 千本桜 is not split, and 神聖 is not read as two names.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.formats.text_lines import read_lines
from jahubert.phonemes import kana_to_phones, normalize_kana
from jahubert.train.text.normalization import normalize_text

# These errors were found in 4,936 words with known readings (file names in the tofugu recipe) and in test
# sentences. The comments show the uncorrected readings. Of 90 words whose readings differed from the known
# ones, 60 still differ, because they have two readings or are suffixes (see docs/readings.md).
NOUNS = {
    "α波": "アルファハ",  # アルファナミ
    "かき氷": "カキゴーリ",  # カキゴオリ
    "この頃": "コノゴロ",  # コノコロ
    "三日月": "ミカズキ",  # after と: ミッカ ツキ
    "零時": "レージ",  # after 午前: ゼロ ジ
    "千本桜": "センボンザクラ",  # センボン サクラ
    "五十歩百歩": "ゴジッポヒャッポ",  # ゴジュッポ ヒャッポ
    "真水": "マミズ",  # alone: シミズ
    "一歩": "イッポ",  # alone: ハジメ
    "不孝者": "フコーモノ",  # フコーシャ
    "塩水": "シオミズ",  # エンスイ
    "対等": "タイトー",  # タイトウ
    "小文字": "コモジ",  # コモンジ
    "干潟": "ヒガタ",  # ヒカタ
    "有り難う": "アリガトー",  # アリガタウ
    "正義": "セーギ",  # alone: マサヨシ
    "沼沢": "ショータク",  # ヌマサワ
    "活用形": "カツヨーケー",  # カツヨーガタ
    "灯り": "アカリ",  # トモリ
    "白鳥": "ハクチョー",  # シラトリ
    "神聖": "シンセー",  # alone or before a name: カミ キヨシ
    "給油所": "キューユジョ",  # キューユショ
    "縦書": "タテガキ",  # タテ ショ
    "複数形": "フクスーケー",  # フクスーガタ
    "詩歌": "シイカ",  # シカ
    "軍艦島": "グンカンジマ",  # グンカントー
    "辞書形": "ジショケー",  # ジショガタ
    "過去形": "カコケー",  # カコカタチ
    "金星": "キンセー",  # カナボシ
}
ICHIDAN, GODAN_RA = "一段", "五段・ラ行"
VERBS = {  # stem -> (pronunciation of the stem, conjugation)
    "点け": ("ツケ", ICHIDAN),  # the form 点ける: テンケル
    "紛れ": ("マギレ", ICHIDAN),  # マガエレル
    "蒸れ": ("ムレ", ICHIDAN),  # フケレル
    "被": ("カブ", GODAN_RA),  # コームル
}
_ENDINGS = {
    ICHIDAN: ("ル 基本形", " 連用形", " 未然形", "レ 仮定形", "ロ 命令ｒｏ", "ヨ 未然ウ接続"),
    GODAN_RA: ("ル 基本形", "リ 連用形", "ラ 未然形", "ッ 連用タ接続", "レ 仮定形", "ロ 未然ウ接続"),
}
_COMMENT = re.compile(r"(?:^|(?<=\s))#")
# The analyzer converts ASCII characters to full-width characters, and some of them to other characters.
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}
_WIDE = _FULL_WIDTH | str.maketrans("-'\"`~\\", "−’”‘〜￥")
_COST = -6000  # so low that words in the user dictionary are preferred over any other segmentation


@cache
def dictionary(path: Path | None = None) -> Any:
    """Create pyopenjtalk's analyzer with the corrections in this module and the user dictionary `path`.

    Raises:
        DataError: the user dictionary is invalid (see `read_words`).
    """
    import pyopenjtalk

    rows = [_noun(surface, kana) for surface, kana in NOUNS.items()]
    rows += [row for stem, (reading, kind) in VERBS.items() for row in _verb(stem, reading, kind)]
    rows += [_noun(surface, kana) for surface, kana in read_words(path)] if path else []
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, "words.csv"), Path(folder, "words.dic")
        source.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        with _quiet():
            pyopenjtalk.mecab_dict_index(str(source), str(compiled))
        return pyopenjtalk.OpenJTalk(
            dn_mecab=pyopenjtalk.OPEN_JTALK_DICT_DIR,
            userdic=str(compiled).encode(),
            userdic_reading_protection=[True],
        )


@cache
def kept_words(path: Path | None) -> re.Pattern[str] | None:
    """Return a pattern for the words of a user dictionary that `normalize_text` would change (7-11)."""
    if path is None:
        return None
    words = {unicodedata.normalize("NFC", surface) for surface, _ in read_words(path)}
    changed = {word for word in words if normalize_text(word) != unicodedata.normalize("NFKC", word)}
    forms = changed | {unicodedata.normalize("NFKC", word).translate(_FULL_WIDTH) for word in changed}
    longest_first = sorted(forms, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(_whole_word, longest_first))) if changed else None


def _whole_word(word: str) -> str:
    """Return a pattern for a word that is not part of a longer number or Latin word (as 7-11 in 7-11-2)."""
    start = r"(?<![0-9A-Za-z])(?<!\d[-.:/])" if re.match("[0-9A-Za-z]", word) else ""
    end = r"(?![0-9A-Za-z]|[-.:/]\d)" if re.search("[0-9A-Za-z]$", word) else ""
    return f"{start}{re.escape(word)}{end}"


def read_words(path: Path) -> list[tuple[str, str]]:
    """Read (surface, katakana pronunciation) pairs from a user dictionary.

    Each line of the file consists of the spelling of a word, a tab, and the reading in kana. `#` at the start
    of a line or after white space starts a comment.

    Raises:
        DataError: the file cannot be read, or a line does not consist of a word and a reading.
    """
    words = []
    for number, line in read_lines(path, "user dictionary"):
        line = _COMMENT.split(line)[0].rstrip()
        if not line.strip():
            continue
        surface, _, reading = (part.strip() for part in line.partition("\t"))
        try:
            if not (surface and kana_to_phones(reading)):
                raise DataError("expected a word, a tab, and the reading of the word in kana")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        words.append((surface, normalize_kana(reading, surface)))
    return words


def _noun(surface: str, kana: str) -> str:
    return _row(surface, "名詞,一般,*,*,*,*", kana)


def _verb(stem: str, reading: str, kind: str) -> Iterator[str]:
    for ending in _ENDINGS[kind]:
        kana, form = ending.split(" ")
        written = "".join(chr(ord(char) - 0x60) for char in kana)
        yield _row(stem + written, f"動詞,自立,*,*,{kind},{form}", reading + kana)


def _row(surface: str, grammar: str, kana: str) -> str:
    """Format a line of a MeCab dictionary. MeCab fills in the empty context ids."""
    wide = unicodedata.normalize("NFKC", surface).translate(_WIDE)
    return f"{wide},,,{_COST},{grammar},{wide},{kana},{kana},0/{len(kana)},*"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output to file descriptor 1, where the C++ dictionary compiler prints its progress."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
