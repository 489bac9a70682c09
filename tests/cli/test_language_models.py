"""Tests of the commands `ngram` and `perplexity` with every text unit."""

from __future__ import annotations

import gzip
import io
import os

import pytest

from jahubert.cli.main import main
from jahubert.formats.bundle import LanguageModel, load_bundle, save_bundle
from jahubert.lm.arpa import read_arpa
from jahubert.lm.lexicon import read_lexicon
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.targets import kana_set

TEXT = "今日は、雨です。\n明日は雨かな？\n\n雨が降る。\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("unit", "options", "expected"),
    [
        ("word", [], {"雨", "今日", "は"}),
        ("phone", [], {"|", "ky", "o:", "a"}),
        ("kana", [], {"|", "ョ", "ー", "ワ"}),
        ("character", [], {"雨", "日"}),
        ("character", ["--punctuation"], {"。", "、", "?"}),
        ("token", [], {"今日は、雨です。"}),
    ],
)
def test_ngram_model_is_trained_for_each_unit(tmp_path, text, unit, options, expected, capsys):
    out = tmp_path / "new" / "lm.arpa.gz"
    assert main(["ngram", text, "--unit", unit, "--order", "2", "-o", str(out), *options]) == 0
    words = set(read_arpa(out).words)
    assert expected <= words
    assert ("。" in words) == bool(options)
    assert main(["perplexity", str(out), text, "--unit", unit, *options]) == 0
    assert "3 sentences" in capsys.readouterr().out


def test_ngram_model_is_pruned(tmp_path, text):
    models = []
    for gain in ("0", "1"):
        assert main(["ngram", text, "--min-gain", gain, "-o", str(tmp_path / "lm.arpa")]) == 0
        models.append(read_arpa(tmp_path / "lm.arpa"))
    assert models[0].words == models[1].words
    assert sum(models[0].counts) > sum(models[1].counts)


@pytest.mark.parametrize(("options", "symbols"), [([], PhonemeSet.standard()), (["--kana"], kana_set())])
def test_lexicon_lists_the_words_with_their_pronunciations(tmp_path, text, options, symbols):
    paths = ["-o", str(tmp_path / "lm.arpa"), "--lexicon", str(tmp_path / "words.txt")]
    assert main(["ngram", text, *paths, *options]) == 0
    entries = read_lexicon(tmp_path / "words.txt", symbols)
    spelled = ("ア", "メ") if options else ("a", "m", "e")
    assert ("雨", spelled) in entries
    assert {word for word, _ in entries} <= set(read_arpa(tmp_path / "lm.arpa").words)


def test_gzip_text_may_have_any_name_and_folders_are_explained(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    packed = tmp_path / "texts" / "text.txt"
    packed.write_bytes(gzip.compress("雨\n".encode()))
    out = tmp_path / "lm.arpa"
    assert main(["ngram", str(packed), "--unit", "character", "-o", str(out)]) == 0
    assert "雨" in read_arpa(out).words
    read, write = os.pipe()
    os.write(write, "雪\n".encode())
    os.close(write)
    assert main(["ngram", f"/dev/fd/{read}", "--unit", "character", "-o", str(out)]) == 0
    assert "雪" in read_arpa(out).words
    assert main(["ngram", str(tmp_path / "texts"), "--unit", "character", "-o", str(out)]) == 2
    assert "texts/*.txt" in capsys.readouterr().err


def test_text_is_read_from_gzip_and_standard_input(tmp_path, text, monkeypatch):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress("雨\n".encode()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("雪\n".encode())))
    out = tmp_path / "lm.arpa"
    assert main(["ngram", text, str(packed), "-", "--unit", "character", "-o", str(out)]) == 0
    assert {"雨", "雪", "降"} <= set(read_arpa(out).words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unit", "phone", "--lexicon", "x"], "--lexicon"),
        (["--kana"], "--kana"),
        (["--punctuation"], "--punctuation"),
        (["--order", "0"], "order"),
        (["--min-gain", "-1"], "--min-gain"),
        (["--min-gain", "nan"], "--min-gain"),
    ],
)
def test_contradictory_options_are_rejected(tmp_path, text, options, message, capsys):
    assert main(["ngram", text, "-o", str(tmp_path / "lm.arpa"), *options]) == 2
    assert message in capsys.readouterr().err


def test_unreadable_files_are_rejected(tmp_path, text, capsys):
    assert main(["ngram", str(tmp_path / "none.txt"), "-o", str(tmp_path / "lm.arpa")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert main(["perplexity", text, text]) == 2
    assert "text.txt" in capsys.readouterr().err


def test_ngram_of_the_model_can_be_disabled(tmp_path, text, bundle, folder, capsys):
    assert main(["ngram", text, "--unit", "phone", "--order", "2", "-o", "phones.arpa.gz"]) == 0
    model = load_bundle(bundle)
    ngram = LanguageModel(tmp_path / "phones.arpa.gz", weight=30.0, word_bonus=0.0)
    save_bundle("with-ngram", ctc=model.ctc, phonemes=model.phonemes, language_model=ngram)

    def transcribe(model: str, *options: str) -> str:
        assert main(["transcribe", "--model", model, "data/a.wav", *options]) == 0
        return capsys.readouterr().out

    plain = transcribe(bundle)
    assert transcribe("with-ngram", "--no-lm") == plain != transcribe("with-ngram")
    assert main(["transcribe", "--model", "with-ngram", "data/a.wav", "--no-lm", "--lm-weight", "1"]) == 2
    assert "lm_weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "text.txt"],
        ["-o", "link.txt"],
        ["-o", "lm.arpa", "--lexicon", "text.txt"],
        ["-o", "lm.arpa", "--lexicon", "lm.arpa"],
        ["-o", "folder"],
        ["-o", "fifo"],
        ["-o", "broken/lm.arpa"],
        ["-o", "text.txt/lm.arpa"],
        ["-o", ""],
    ],
)
def test_unsuitable_outputs_are_rejected_before_the_training(tmp_path, text, options, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jahubert.lm.kneser_ney.train_ngram", None)
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("text.txt", "link.txt")
    os.symlink("missing", "broken")
    assert main(["ngram", text, *options]) == 2
    error = capsys.readouterr().err
    assert options[-2] in error and options[-1] in error and error.count("\n") == 1
    assert (tmp_path / "text.txt").read_text(encoding="utf-8") == TEXT and not os.path.exists("missing")
