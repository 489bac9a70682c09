"""Text to words to phones."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from jahubert.errors import DataError, MissingExtraError
from jahubert.phonemes import PHONES
from jahubert.train import text as text_module
from jahubert.train.text import text_to_phones, text_to_words

pytest.importorskip("pyopenjtalk")


def kana(text: str) -> list[str]:
    return [word.kana for word in text_to_words(text)]


def test_words_are_what_is_said():
    words = text_to_words("昨日、東京で新しいパソコンを買いましょう。")
    assert [(w.surface, w.kana) for w in words] == [
        ("昨日", "キノー"),
        ("東京", "トーキョー"),
        ("で", "デ"),
        ("新しい", "アタラシイ"),
        ("パソコン", "パソコン"),
        ("を", "ヲ"),
        ("買い", "カイ"),
        ("ましょう", "マショー"),
    ]
    assert words[0].phones == ("k", "i", "n", "o:")
    assert words[-1].phones == ("m", "a", "sh", "o:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("これは学校へ", ["コレ", "ワ", "ガッコー", "エ"]),
        ("好きです", ["スキ", "デス"]),
        ("ﾊﾛｰ", ["ハロー"]),
        ("行ってって", ["イッ", "テ", "ッテ"]),
        ("何ですか", ["ナン", "デス", "カ"]),
        ("何を", ["ナニ", "ヲ"]),
        ("何人", ["ナン", "ニン"]),
        ("そう言う", ["ソー", "ユー"]),
        ("[笑]☆😀", ["ワライ"]),
        ("ーです", ["デス"]),
        ("お、っ。ー", ["オ"]),
        ("でしょうか\n\t行く", ["デショー", "カ", "イク"]),
    ],
)
def test_readings(text, expected):
    assert kana(text) == expected


def test_numbers_and_latin_are_read():
    assert "".join(kana("IBMの3月15日、24時")) == "アイビーエムノサンガツジューゴニチニジューヨジ"


def test_phones_of_a_text():
    assert text_to_phones("今日は雨") == (("ky", "o:"), ("w", "a"), ("a", "m", "e"))
    assert {p for word in text_to_phones("ヴァイオリンとティッシュ、ヂュース、クヮ") for p in word} <= set(
        PHONES
    )


@pytest.mark.parametrize("text", ["", "  ", "。…☆", "ッ"])
def test_text_without_words(text):
    with pytest.raises(DataError, match="nothing to read"):
        text_to_words(text)


def test_letters_without_reading_are_named():
    with pytest.raises(DataError, match="Привет"):
        text_to_words("今日Привет")


def test_nothing_is_printed():
    code = "from jahubert.train.text import text_to_words; text_to_words('何')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pyopenjtalk":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    text_module.openjtalk.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"jahubert\[train\]"):
        text_to_words("今日")
