"""Tests of conversion between kana and phones, long vowels, and phoneme sets."""

from __future__ import annotations

import csv
import re

import pytest

from jahubert.errors import DataError
from jahubert.phonemes import (
    PHONES,
    PhonemeSet,
    kana_to_phones,
    normalize_kana,
    normalize_kana_words,
    phones_to_kana,
    to_katakana,
)


def test_inventory_is_the_forty_phones_of_the_csj_recipe():
    named = "N a a: b by ch d dy e e: f g gy h hy i i: j k ky m my n ny o o: p py q r ry s sh t ts u u: w y z"
    assert sorted(PHONES) == sorted(named.split())
    assert len(PHONES) == len(set(PHONES)) == 40
    first = "a i u e o a: i: u: e: o: N q w y j my ky dy by gy ny hy ry py p t k ts ch b d g z m n s sh h f r"
    assert list(PHONES) == first.split()


@pytest.mark.parametrize(
    ("kana", "phones"),
    [
        ("ッア ン ヂ ヅ ヲ", "q a N j i z u o"),
        ("ティ ディ トゥ ドゥ デュ テュ ヂュ", "t i d i t u d u d u ts u dy u"),
        ("ヴ ヴァ ヴィ ヴェ ヴォ", "b u b a b i b e b o"),
        ("ウィ ウェ ウォ", "w i w e w o"),
        ("ファ フィ フェ フォ フュ フョ", "f a f i f e f o hy u hy o"),
        ("ツァ ツィ ツェ ツォ", "ts a ts i ts e ts o"),
        ("シェ ジェ ジァ チェ イェ", "sh e j e j a ch e i e"),
        ("ニェ ヒェ ミェ ブィ スィ ズィ クヮ グヮ ヮ", "n e h e m e b i sh i j i k a g a w a"),
        ("キャ シュ チョ ニャ ヒュ ミョ", "ky a sh u ch o ny a hy u my o"),
        ("リャ ギュ ジョ ビャ ピュ", "ry a gy u j o by a py u"),
        # Rare syllables, which consist of a consonant and a small vowel.
        ("ビェ リェ キェ ギェ ピェ グェ クェ デェ", "b e r e k e g e p e g e k e d e"),
        ("デャ テャ デョ テョ グァ クァ クォ グォ", "d a t a d o t o g a k a k o g o"),
        ("クィ グィ クゥ グゥ シィ", "k i g i k u g u sh i"),
        ("エェ ァ ィ ゥ ェ ォ", "e e a i u e o"),
        ("ヰ ヱ ヵ ヶ", "i e k a k e"),
    ],
)  # fmt: skip
def test_kana_are_mapped_to_phones(kana, phones):
    assert [phone for part in kana.split() for phone in kana_to_phones(part)] == phones.split()


@pytest.mark.parametrize(
    ("kana", "phones"),
    [
        ("チョーメ", "ch o: m e"),
        ("セッケート", "s e q k e: t o"),
        ("ーデス", "d e s u"),
        ("エーー", "e:"),
        ("ンー", "N"),
        ("オオエイ", "o o e i"),
        ("しんぶん", "sh i N b u N"),
        ("ｶﾞｯｺｰ", "g a q k o:"),
        ("ヴぁいオりん", "b a i o r i N"),
        ("ンァ", "N a"),
        ("いすゞ", "i s u z u"),
        ("ミスヾ", "m i s u z u"),
        ("ここゝ", "k o k o k o"),
        ("か\u3099", "g a"),
        ("", ""),
    ],
)
def test_words_are_mapped_to_phones(kana, phones):
    assert kana_to_phones(kana) == phones.split()


@pytest.mark.parametrize("kana", ["漢字", "カxキ", "カ、キ", "カ キ", "〇", "ヽ"])
def test_character_that_is_not_kana_is_named(kana):
    bad = next(c for c in kana if not kana_has_reading(c))
    with pytest.raises(DataError, match=re.escape(repr(bad))):
        kana_to_phones(kana)


def kana_has_reading(char: str) -> bool:
    return char in "カキ"


@pytest.mark.parametrize("kana", ["ー", "ッ", "ッー"])
def test_word_without_a_vowel_is_rejected(kana):
    with pytest.raises(DataError, match=re.escape(repr(kana))):
        kana_to_phones(kana)


def test_every_kana_survives_a_round_trip_through_phones():
    large = [chr(c) for c in range(ord("ァ"), ord("ヺ") + 1)]
    for base in large:
        for small in ["", *"ァィゥェォャュョヮーン"]:
            if base == "ッ" and small in ("", "ー"):
                continue
            phones = kana_to_phones(base + small)
            assert phones
            assert set(phones) <= set(PHONES)
            assert kana_to_phones(phones_to_kana(phones)) == phones


def test_every_phone_sequence_has_a_spelling():
    for phone in PHONES:
        for following in PHONES:
            assert re.fullmatch(r"[ァ-ヺー]+", phones_to_kana([phone, following]))
    assert phones_to_kana([*"koN|baNwa"]) == "コン バンワ"
    assert phones_to_kana(["s", "k", "i"]) == "スキ"
    with pytest.raises(DataError, match="'x'"):
        phones_to_kana(["x"])


@pytest.mark.parametrize(
    ("reading", "surface", "kana"),
    [
        ("せんせい", None, "センセー"),
        ("とうきょう", None, "トーキョー"),
        ("おおきい", None, "オーキイ"),
        ("くうき", None, "クーキ"),
        ("おねえさん", None, "オネーサン"),
        ("おかあさん", None, "オカーサン"),
        ("おにいさん", None, "オニーサン"),
        ("はあく", None, "ハアク"),
        ("あたらしい", None, "アタラシイ"),
        ("きゅうきゅうしゃ", None, "キューキューシャ"),
        ("おもう", None, "オモウ"),
        ("おう", "追う", "オウ"),
        ("おう", "王", "オー"),
        ("すう", "吸う", "スウ"),
        ("すう", "数", "スー"),
        ("こうし", "子牛", "コウシ"),
        ("こうし", "講師", "コーシ"),
        ("ありがとう", "有り難う", "アリガトー"),
        ("いこう", "行こう", "イコー"),
        ("つづく", None, "ツズク"),
        ("こんにちは", None, "コンニチワ"),
        ("ケーキ", None, "ケーキ"),
        ("コーエン", None, "コーエン"),
    ],
)
def test_kana_are_normalized(reading, surface, kana):
    assert normalize_kana(reading, surface) == kana


@pytest.mark.parametrize(
    ("words", "surface", "spoken"),
    [
        ("わたし は がっこう へ いく", "私は学校へ行く", "ワタシ ワ ガッコー エ イク"),
        ("いえ には いない とは いえ", None, "イエ ニワ イナイ トワ イエ"),
        ("は が いたい", None, "ハ ガ イタイ"),
        ("ワタシ ワ イク", None, "ワタシ ワ イク"),
        ("むし の は", "虫の歯", "ムシ ノ ハ"),
        ("は", None, "ハ"),
        ("おう", "追う", "オウ"),
        ("おう", "王", "オー"),
        ("かみ を ととのう", None, "カミ オ トトノウ"),
        ("みずうみ", "湖", "ミズウミ"),
        ("", None, ""),
    ],
)
def test_words_of_a_sentence_in_kana_are_read_in_context(words, surface, spoken):
    assert " ".join(normalize_kana_words(words.split(), surface)) == spoken


def test_to_katakana_keeps_other_characters():
    assert to_katakana("かなｶﾅ漢字A") == "カナカナ漢字A"


def test_tofugu_readings_have_phones(shared_data):
    table = shared_data / "tofugu" / "pronunciations.tsv"
    if not table.is_file():
        pytest.skip("needs the Tofugu corpus")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) > 4000
    right = 0
    for row in rows:
        assert kana_to_phones(row["kana"]) == row["phones"].split()
        reading = re.search("【(.*)】", row["file"]).group(1)
        right += kana_to_phones(normalize_kana(reading, row["surface"])) == row["phones"].split()
    assert right / len(rows) >= 0.998


def test_phoneme_set_maps_phones_to_labels():
    phonemes = PhonemeSet.standard()
    assert len(phonemes) == 42
    assert (phonemes.blank, phonemes.boundary) == (0, 1)
    assert phonemes.symbols[2:] == PHONES
    words = [("k", "o:"), ("N",), ("a:",)]
    labels = phonemes.encode(words)
    assert labels.count(1) == 2
    assert labels[0] != 1 != labels[-1]
    assert phonemes.decode(labels) == words
    assert phonemes.decode([1, 0, *labels, 1, 1, 0, 1]) == words
    assert phonemes.encode([]) == phonemes.encode([(), ()]) == []
    assert phonemes.encode([(), ("a",), (), ("i",)]) == phonemes.encode([("a",), ("i",)])
    assert PhonemeSet.from_json(phonemes.to_json()) == phonemes


@pytest.mark.parametrize(
    "bad", [{}, None, {"symbols": "abc"}, {"symbols": ["a"]}, {"symbols": ["<blank>", "|", "a", "a"]}]
)
def test_invalid_phoneme_set_is_rejected(bad):
    with pytest.raises(DataError):
        PhonemeSet.from_json(bad)


def test_phoneme_set_names_an_unknown_phone():
    phonemes = PhonemeSet.standard()
    for symbol in ("v", "|", "<blank>"):
        with pytest.raises(DataError, match=re.escape(symbol)):
            phonemes.encode([("a", symbol)])
    with pytest.raises(DataError, match="42"):
        phonemes.decode([42])
