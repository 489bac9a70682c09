"""Words that the dictionary of pyopenjtalk-plus lacks or reads wrongly: known errors, and a user's own words.

Both become one user dictionary of MeCab, compiled in memory of a temporary folder (3 ms), so that a corrected
word is also found as one word: 正義 is not split, 神聖 is not read as two names.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.phonemes import kana_to_phones, normalise_kana

# Found by reading 4,936 words whose reading is known (the file names of recipe tofugu) and the sentences of
# the tests. Of 90 words that differed, 60 still do: they have two readings, or stand for a suffix (〜人).
# docs/readings.md lists them.
NOUNS = {
    "α波": "アルファハ",  # アルファナミ
    "かき氷": "カキゴーリ",  # カキゴオリ
    "この頃": "コノゴロ",  # コノコロ
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
    "神聖": "シンセー",  # before a name: カミ キヨシ
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
VERBS = {  # stem -> (stem as it is said, conjugation)
    "点け": ("ツケ", ICHIDAN),  # the form 点ける: テンケル
    "紛れ": ("マギレ", ICHIDAN),  # マガエレル
    "蒸れ": ("ムレ", ICHIDAN),  # フケレル
    "被": ("カブ", GODAN_RA),  # コームル
}
_ENDINGS = {
    ICHIDAN: ("ル 基本形", " 連用形", " 未然形", "レ 仮定形", "ロ 命令ｒｏ", "ヨ 未然ウ接続"),
    GODAN_RA: ("ル 基本形", "リ 連用形", "ラ 未然形", "ッ 連用タ接続", "レ 仮定形", "ロ 未然ウ接続"),
}
_COST = -6000  # so low that a word of ours wins over whatever its characters could be split into


@cache
def dictionary(path: Path | None = None) -> Any:
    """pyopenjtalk's analyser with the corrections of this file, and with a user's words from `path`.

    The file has one word a line: as it is written, a tab, its reading in kana; `#` starts a comment.

    Raises:
        DataError: no such file, or a line that is not a word and a reading, by its number.
    """
    import pyopenjtalk

    rows = [_noun(surface, kana) for surface, kana in NOUNS.items()]
    rows += [row for stem, (said, kind) in VERBS.items() for row in _verb(stem, said, kind)]
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


def read_words(path: Path) -> list[tuple[str, str]]:
    """(surface, katakana pronunciation) of a user dictionary; DataError as in `dictionary`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no user dictionary that can be read ({error})") from error
    words = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].rstrip()
        if not line.strip():
            continue
        surface, _, reading = (part.strip() for part in line.partition("\t"))
        try:
            if not (surface and kana_to_phones(reading)):
                raise DataError("a word, a tab and its reading in kana are needed")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        words.append((surface, normalise_kana(reading, surface)))
    return words


def _noun(surface: str, kana: str) -> str:
    return _row(surface, "名詞,一般,*,*,*,*", kana)


def _verb(stem: str, said: str, kind: str) -> Iterator[str]:
    for ending in _ENDINGS[kind]:
        kana, form = ending.split(" ")
        written = "".join(chr(ord(char) - 0x60) for char in kana)
        yield _row(stem + written, f"動詞,自立,*,*,{kind},{form}", said + kana)


def _row(surface: str, grammar: str, kana: str) -> str:
    """A line of a MeCab dictionary; MeCab finds the context numbers of the grammar by itself."""
    # The analyser sees ASCII in its full-width form.
    wide = unicodedata.normalize("NFKC", surface)
    wide = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in wide)
    return f"{wide},,,{_COST},{grammar},{wide},{kana},{kana},0/{len(kana)},*"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard output, where the compiler, which is C++, shows its progress."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
