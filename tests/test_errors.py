"""Tests that errors can be pickled, and that messages shorten long quoted values."""

from __future__ import annotations

import pickle

import pytest

from jahubert.cli.main import main
from jahubert.errors import AudioError, DataError, MissingExtraError, quote, shorten
from jahubert.lm.arpa import read_arpa
from jahubert.lm.lexicon import read_lexicon
from jahubert.phonemes import PhonemeSet, kana_to_phones
from jahubert.train.data.utterances import Rejected

LONG = 500_000


def test_errors_pickle_with_their_attributes():
    error = AudioError("a.wav is empty")
    error.reported = True
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, AudioError) and str(copy) == "a.wav is empty" and copy.reported
    extra = pickle.loads(pickle.dumps(MissingExtraError("tqdm", "train")))
    assert (extra.package, extra.extra, extra.reported) == ("tqdm", "train", False)


def test_quoted_values_are_short():
    long = "a" * LONG
    for value in (long, long.encode(), [long] * 100, {long: 1}, 10**LONG, [[[[[[1]]]]]]):
        assert len(quote(value)) < 1500


def test_short_values_are_quoted_in_full():
    assert quote("a" * 90) == repr("a" * 90) and shorten("あ" * 10, 10) == "あ" * 10
    assert shorten("ab" * LONG, 100).startswith("ab") and len(shorten("ab" * LONG, 100)) < 150
    assert len(Rejected("a", "malformed line", "b" * LONG).detail) < 3000


def test_message_about_a_lexicon_is_short(tmp_path):
    for line in ("a" * LONG, "a " + "b" * LONG, "a " + "xy " * (LONG // 3)):
        (tmp_path / "words.txt").write_text(line + "\n")
        with pytest.raises(DataError, match=r"words\.txt:1") as caught:
            read_lexicon(tmp_path / "words.txt", PhonemeSet.standard())
        assert len(str(caught.value)) < 1000


def test_message_about_an_arpa_file_is_short(tmp_path):
    for unigram in (
        b"\xff" * 60_000,
        b"-1\t" + b"\xff" * 60_000,
        b"x" * 60_000 + b" a",
        b"-1 a b " + b"x" * 60_000,
    ):
        (tmp_path / "a.arpa").write_bytes(b"\\data\\\nngram 1=1\n\n\\1-grams:\n" + unigram + b"\n\n\\end\\\n")
        with pytest.raises(DataError, match=r"a\.arpa:5") as caught:
            read_arpa(tmp_path / "a.arpa")
        assert len(str(caught.value)) < 1000


def test_message_about_kana_is_short():
    with pytest.raises(DataError) as caught:
        kana_to_phones("ア" * LONG + "x")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "arguments", [["info"], ["run", "recipe=demo"], ["plan", "recipe=demo"], ["units", "--layer"]]
)
def test_printed_messages_are_short(arguments, capsys):
    assert main([*arguments, "x" * LONG]) == 2
    assert 0 < len(capsys.readouterr().err) < 15_000
