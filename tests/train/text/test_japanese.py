"""Text to words to phones."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from fixtures import FIXTURES

from jahubert.errors import DataError, MissingExtraError
from jahubert.phonemes import PHONES
from jahubert.train.text import japanese as text_module
from jahubert.train.text import user_dictionary as readings
from jahubert.train.text.japanese import normalize_text, text_to_phones, text_to_words

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
        ("モー ツァ", ["モー", "ツァ"]),
        ("ツァ ツァ", ["ツァ", "ツァ"]),
        ("うわァ", ["ウワー"]),
        ("ヷイオリン ワ\u3099", ["ヴァイオリン", "ヴァ"]),
        ("ヸ、ヹ、ヺ", ["ヴィ", "ヴェ", "ヴォ"]),
        ("でしょうか\n\t行く", ["デショー", "カ", "イク"]),
    ],
)
def test_readings(text, expected):
    assert kana(text) == expected


def test_numbers_and_latin_are_read():
    assert "".join(kana("IBMの3月15日、24時")) == "アイビーエムノサンガツジューゴニチニジューヨジ"


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_a_clock_has_two_digits_of_minutes_and_anything_else_is_a_score(text, said):
    assert "".join(kana(text)) == said


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_a_letter_has_one_name_wherever_it_stands(text, said):
    assert "".join(kana(text)) == said


DOC = (Path(__file__).parents[3] / "docs" / "readings.md").read_text(encoding="utf-8")
DIFFERENCES = re.findall(
    r"^\| ([^|`]+) \| ([ァ-ヺー]+) \| ([ァ-ヺー]+) \|$", DOC.partition("known reading")[2], re.M
)


def test_the_words_that_the_page_lists_are_read_as_it_says():
    assert len(DIFFERENCES) == 60
    for word, read, known in DIFFERENCES:
        assert "".join(kana(word)) == read != known, word


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
    code = "from jahubert.train.text.japanese import text_to_words; text_to_words('何')"
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


# --- sentences of the project's own -----------------------------------------------------------------------

LINES = (FIXTURES / "sentences.tsv").read_text(encoding="utf-8").splitlines()
SENTENCES = dict(line.partition("\t")[::2] for line in LINES if line and not line.startswith("#"))


def letters(text: str) -> str:
    return "".join(char for char in text if unicodedata.category(char)[0] == "L" and char != "ー")


def test_several_hundred_sentences_come_out_in_the_40_phones_and_whole():
    """Every sentence has words, every word phones of the 40, and no letter of a sentence is left out."""
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


@pytest.mark.parametrize("sentence", [sentence for sentence, said in SENTENCES.items() if said])
def test_sentences_with_a_known_reading(sentence):
    assert kana(sentence) == SENTENCES[sentence].split()


@pytest.mark.parametrize("surface", readings.NOUNS)
def test_known_errors_of_the_dictionary_are_corrected(surface):
    """Each entry mends something: without it the analyser says another thing."""
    own = text_module.openjtalk().run_frontend(surface, predict_nani=False)
    assert "".join(kana(surface)) == readings.NOUNS[surface]
    assert "".join(f["pron"] for f in own).replace("’", "") != readings.NOUNS[surface]


# --- a user's dictionary ----------------------------------------------------------------------------------


def test_a_users_words_are_read_as_they_say(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text(
        "# names\njahubert\tジャヒューバート\n大空翔子 \tおおぞらしょうこ # a person\n\nK8s\tクーベ\n"
    )
    said = text_to_words("大空翔子はjahubertとＫ８ｓを使う", path)
    assert [word.kana for word in said] == [
        "オーゾラショーコ", "ワ", "ジャヒューバート", "ト", "クーベ", "ヲ", "ツカウ"
    ]  # fmt: skip
    other = tmp_path / "letters.tsv"
    other.write_text("NHK杯\tエヌエイチケイハイ\n", encoding="utf-8")
    assert [word.kana for word in text_to_words("NHK杯", other)] == ["エヌエイチケーハイ"]
    assert "ジャヒューバート" not in kana("jahubert")  # and nobody else's are changed


@pytest.mark.parametrize("line", ["名前だけ", "名前\t漢字", "名前\t", "\tナマエ", "名前\tッ"])
def test_a_broken_line_of_a_users_dictionary_is_named(tmp_path, line):
    path = tmp_path / "words.tsv"
    path.write_text(f"# mine\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"words.tsv:2: "):
        text_to_words("今日", path)
    with pytest.raises(DataError, match="no user dictionary"):
        text_to_words("今日", tmp_path / "none.tsv")
