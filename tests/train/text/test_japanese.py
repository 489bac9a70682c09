"""Tests of the Japanese text front end: words, readings, phones, and user dictionaries."""

from __future__ import annotations

import builtins
import re
import string
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from fixtures import FIXTURES

from jahubert.errors import DataError, MissingExtraError
from jahubert.phonemes import PHONES
from jahubert.train.text import japanese as text_module
from jahubert.train.text import user_dictionary
from jahubert.train.text.japanese import text_to_phones, text_to_words
from jahubert.train.text.normalization import normalize_text

pytest.importorskip("pyopenjtalk")


def kana(text: str) -> list[str]:
    return [word.kana for word in text_to_words(text)]


def test_words_have_surface_reading_and_phones():
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
        ("何て言った", ["ナン", "テ", "イッ", "タ"]),
        ("何人", ["ナン", "ニン"]),
        ("そう言う", ["ソー", "ユー"]),
        ("[笑]☆😀", ["ワライ"]),
        ("ーです", ["デス"]),
        ("お、っ。ー", ["オ"]),
        ("モー ツァ", ["モー", "ツァ"]),
        ("ツァ ツァ", ["ツァ", "ツァ"]),
        ("うわァ", ["ウワー"]),
        ("ヷイオリン ワ\u3099", ["ヴァイオリン", "ヴァ"]),
        ("ヸ、ヹ、ヺ", ["ヴィ", "ヴェ", "ヴォ"]),
        ("でしょうか\n\t行く", ["デショー", "カ", "イク"]),
    ],
)
def test_words_have_the_expected_reading(text, expected):
    assert kana(text) == expected


def test_numbers_and_latin_letters_are_read():
    assert "".join(kana("IBMの3月15日、24時")) == "アイビーエムノサンガツジューゴニチニジューヨジ"


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("9:05", "クジゴフン"),
        ("19:00", "ジュークジ"),
        ("24:00", "ニジューヨジ"),
        ("3:07", "サンジナナフン"),
        ("2:1", "ニタイイチ"),
        ("10:0", "ジュータイゼロ"),
        ("19:5", "ジューキュータイゴ"),
        ("12:60", "ジューニタイロクジュー"),
        ("25:21", "ニジューゴタイニジューイチ"),
        ("1.5:1", "イッテンゴタイイチ"),
        ("2対1", "ニタイイチ"),
    ],
)
def test_clock_times_and_scores_are_distinguished(text, reading):
    assert "".join(kana(text)) == reading


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        *(
            ("A", "エー"),
            ("K", "ケー"),
            ("J", "ジェー"),
            ("H", "エイチ"),
            ("ａ", "エー"),
            ("ABC", "エービーシー"),
        ),
        *(("AI", "エーアイ"), ("OK", "オーケー"), ("NHK", "エヌエイチケー"), ("HDD", "エイチディーディー")),
        *(
            ("Jリーグ", "ジェーリーグ"),
            ("JA", "ジェーエー"),
            ("DNA", "ディーエヌエー"),
            ("V", "ブイ"),
            ("Z", "ゼット"),
        ),
    ],
)
def test_letters_have_one_name_in_every_context(text, reading):
    assert "".join(kana(text)) == reading


DOC = (Path(__file__).parents[3] / "docs" / "readings.md").read_text(encoding="utf-8")
DIFFERENCES = re.findall(
    r"^\| ([^|`]+) \| ([ァ-ヺー]+) \| ([ァ-ヺー]+) \|$", DOC.partition("## Known differences")[2], re.M
)


def test_documented_differences_are_current():
    assert len(DIFFERENCES) == 60
    for word, reading, correct in DIFFERENCES:
        assert "".join(kana(word)) == reading != correct, word


def test_text_is_converted_to_phones():
    assert text_to_phones("今日は雨") == (("ky", "o:"), ("w", "a"), ("a", "m", "e"))
    assert {p for word in text_to_phones("ヴァイオリンとティッシュ、ヂュース、クヮ") for p in word} <= set(
        PHONES
    )


@pytest.mark.parametrize("text", ["", "  ", "。…☆", "ッ"])
def test_text_without_words_is_rejected(text):
    with pytest.raises(DataError, match="no words"):
        text_to_words(text)


def test_error_names_letters_without_a_reading():
    with pytest.raises(DataError, match="Привет"):
        text_to_words("今日Привет")


def test_analysis_prints_nothing():
    code = "from jahubert.train.text.japanese import text_to_words; text_to_words('何')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def import_without_pyopenjtalk(name, *args, **kwargs):
        if name == "pyopenjtalk":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    text_module.openjtalk.cache_clear()
    monkeypatch.setattr(builtins, "__import__", import_without_pyopenjtalk)
    with pytest.raises(MissingExtraError, match=r"\.\[train\]"):
        text_to_words("今日")


# --- sentences --------------------------------------------------------------------------------------------

LINES = (FIXTURES / "sentences.tsv").read_text(encoding="utf-8").splitlines()
SENTENCES = dict(line.partition("\t")[::2] for line in LINES if line and not line.startswith("#"))


def letters(text: str) -> str:
    return "".join(char for char in text if unicodedata.category(char)[0] == "L" and char != "ー")


def test_sentences_use_the_40_phones_and_lose_no_letter():
    """Every sentence has words, every word has phones, and no Japanese letter is dropped."""
    assert len(SENTENCES) > 350
    used, compared = set(), 0
    for sentence in SENTENCES:
        words = text_to_words(sentence)
        assert words and all(word.phones for word in words), sentence
        used |= {phone for word in words for phone in word.phones}
        plain = normalize_text(sentence)
        if not any(unicodedata.category(char)[0] == "N" or "A" <= char <= "z" for char in plain):
            compared += 1
            assert letters("".join(word.surface for word in words)) == letters(plain), sentence
    assert used == set(PHONES)
    assert compared > 250


@pytest.mark.parametrize("sentence", [sentence for sentence, reading in SENTENCES.items() if reading])
def test_checked_sentences_keep_their_reading(sentence):
    assert kana(sentence) == SENTENCES[sentence].split()


READINGS = [
    line.split("\t")[1:]
    for line in (FIXTURES / "readings.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize(("text", "reading"), READINGS)
def test_checked_words_keep_their_reading(text, reading):
    assert "".join(kana(text)) == reading


def test_checked_readings_are_numerous():
    assert len({text for text, _ in READINGS}) == len(READINGS) >= 300


# The analyzer misreads these words only after certain other words.
CONTEXTS = {"三日月": "鼻血と三日月", "零時": "午前零時", "真水": "塩水と真水"}


@pytest.mark.parametrize("surface", user_dictionary.NOUNS)
def test_known_errors_of_the_dictionary_are_corrected(surface):
    """Every entry is needed, because the analyzer returns another reading without it."""
    text = CONTEXTS.get(surface, surface)
    uncorrected = text_module.openjtalk().run_frontend(text, predict_nani=False)
    assert "".join(kana(text)).endswith(user_dictionary.NOUNS[surface])
    assert (
        not "".join(f["pron"] for f in uncorrected).replace("’", "").endswith(user_dictionary.NOUNS[surface])
    )


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("は〜い", "ハーイ"), ("え〜っと", "エーット"), ("で～～す", "デース"),
        ("え〜、次は", "エー ツギ ワ"),
        ("そうだね〜。", "ソーダ ネー"), ("すごーい〜", "スゴーイ"), ("〜から〜まで", "カラ マデ"),
        ("はる〜おもいで〜", "ハル オモイデ"), ("ここから〜", "ココ カラ"),
        ("①②③", "イチ ニ サン"), ("東\u200b京", "トーキョー"), ("東\u00ad京", "トーキョー"),
        ("前日比▲3.2%", "ゼンジツ ヒ マイナス サン テン ニ パーセント"),
    ],
)  # fmt: skip
def test_captions_are_read_as_spoken(text, reading):
    assert " ".join(kana(text)) == reading


# --- user dictionary --------------------------------------------------------------------------------------


def test_user_dictionary_sets_readings(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text(
        "# names\njahubert\tジャヒューバート\n大空翔子 \tおおぞらしょうこ # a person\n\nK8s\tクーベ\n"
    )
    words = text_to_words("大空翔子はjahubertとＫ８ｓを使う", path)
    assert [word.kana for word in words] == [
        "オーゾラショーコ", "ワ", "ジャヒューバート", "ト", "クーベ", "ヲ", "ツカウ"
    ]  # fmt: skip
    other = tmp_path / "letters.tsv"
    other.write_text("NHK杯\tエヌエイチケイハイ\n", encoding="utf-8")
    assert [word.kana for word in text_to_words("NHK杯", other)] == ["エヌエイチケーハイ"]
    assert "ジャヒューバート" not in kana("jahubert")  # without the dictionary


def test_words_of_the_user_dictionary_may_contain_any_sign(tmp_path):
    """Neither the normalization nor the analyzer may change a word before it is looked up."""
    signs = [f"ヌ{sign}ヌ" for sign in string.punctuation]
    others = ["GPT-4", "B'z", "C#", "7-11", "5-0", "2:50", "Node.js", "café", "㈱山田"]
    path = tmp_path / "words.tsv"
    path.write_text("".join(f"{word}\tテスト # {word}\n" for word in signs + others), encoding="utf-8")
    for word in signs + others:
        assert [w.kana for w in text_to_words(f"{word}です", path)] == ["テスト", "デス"], word
    for text in ("Ｃ＃です", "７－１１です"):
        assert [w.kana for w in text_to_words(text, path)] == ["テスト", "デス"]
    for text in ("2017-11-05に", "12:50に", "03-1235-0123に", "え〜、はい"):  # parts of numbers are not words
        assert text_to_words(text, path) == text_to_words(text)
    assert [w.kana for w in text_to_words("3-0です", path)] == [
        "サン",
        "タイ",
        "ゼロ",
        "デス",
    ]  # as without it


@pytest.mark.parametrize("line", ["名前だけ", "名前\t漢字", "名前\t", "\tナマエ", "名前\tッ"])
def test_error_names_the_line_of_a_user_dictionary(tmp_path, line):
    path = tmp_path / "words.tsv"
    path.write_text(f"# mine\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"words.tsv:2: "):
        text_to_words("今日", path)
    with pytest.raises(DataError, match=r"none.tsv"):
        text_to_words("今日", tmp_path / "none.tsv")


def test_numbers_of_many_digits_are_normalized():
    digits = "1" * 5000
    for text in (f"{digits}/2", f"1/{digits}", f"{digits}-{digits}人", f"2-{digits}人"):
        assert "1111" in normalize_text(text)


def test_text_that_is_too_long_for_the_analyzer_is_rejected():
    with pytest.raises(DataError) as caught:
        text_to_words("青い家" * 20_000)
    assert len(str(caught.value)) < 500
