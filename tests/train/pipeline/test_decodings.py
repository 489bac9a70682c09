"""Tests of several decodings of one model, and of reports that compare experiments."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fixtures import FIXTURES

from jahubert import run
from jahubert.cli import main as cli
from jahubert.train.experiment.provenance import DONE, read_record

ROUGH = FIXTURES / "rough"
SETTINGS = ["iterations=0", "finetune.pretrained=null", "score.published={paper: {test: 12.5}}"]


def command(exp: Path, stage: str, *overrides: str) -> list[str]:
    return [f"recipe={ROUGH}", f"exp={exp}", f"stage={stage}", *SETTINGS, *overrides]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    exp = tmp_path_factory.mktemp("whole") / "first"
    assert run.main(command(exp, "all")) == 0
    return exp


@pytest.fixture(scope="module")
def twice(whole) -> Path:
    """Add a second, greedy decoding to the experiment, and compare it with the first one."""
    baseline = f"score.baseline={whole}/systems/main/decode"
    assert run.main(command(whole, "all", "decoding=greedy", "decode.search=greedy", baseline)) == 0
    return whole


@pytest.fixture
def copy(twice, tmp_path) -> Path:
    return Path(shutil.copytree(twice, tmp_path / "second"))


def test_second_decoding_is_stored_next_to_the_first(twice, capsys):
    system = twice / "systems/main"
    assert sorted(path.name for path in system.iterdir()) == [
        "decode", "decode-greedy", "finetune", "score", "score-greedy"
    ]  # fmt: skip
    records = {path.parent.name: read_record(path) for path in system.glob(f"*/{DONE}")}
    assert records["decode"]["settings"]["model"] == records["decode-greedy"]["settings"]["model"]
    assert [records[f"decode{name}"]["metrics"]["search"] for name in ("", "-greedy")] == ["beam 2", "greedy"]
    assert "beam" not in records["decode-greedy"]["metrics"]
    scores = json.loads((system / "score-greedy/scores.json").read_text())
    plain = json.loads((system / "score/scores.json").read_text())
    assert scores["test"]["against"]["wer"]["baseline"] == plain["test"]["wer"]["rate"]
    assert cli.main(["status", str(twice)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"systems/main/decode-greedy +done .*search greedy", shown)
    assert re.search(r"systems/main/score-greedy +done", shown)


def test_changed_search_suggests_a_named_decoding(twice, capsys):
    capsys.readouterr()
    assert run.main(command(twice, "decode", "decode.search=greedy")) == 2
    message = capsys.readouterr().err
    assert "decode.search was beam, now greedy" in message and "decoding=NAME" in message
    assert run.main(command(twice, "decode", "decoding=a/b")) == 2
    assert "decoding=a/b" in capsys.readouterr().err


def test_report_has_all_decodings_and_other_experiments(copy, twice, capsys):
    capsys.readouterr()
    assert run.main(command(copy, "report", f"report.compare_with=[{twice}]")) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  ((?:published|here): .*?)  ", printed, re.M) == [
        "published: paper",
        "here: second, from scratch, beam 2",
        "here: second, from scratch, greedy",
        "here: first, from scratch, beam 2",
        "here: first, from scratch, greedy",
    ]
    summary = json.loads((copy / "report/metrics.json").read_text())["systems"]
    assert list(summary) == ["main", "main, greedy", "first: main", "first: main, greedy"]
    assert summary["main"]["scores"] == summary["first: main"]["scores"]
    page = (copy / "report/report.html").read_text(encoding="utf-8")
    assert "<h3>main, greedy</h3>" in page and "first: main, greedy" in page and "published: paper" in page
    (copy.parent / "empty").mkdir()
    assert run.main(command(copy, "report", f"report.compare_with=[{copy.parent / 'empty'}]")) == 2
    assert "empty has no scores" in capsys.readouterr().err
    assert run.main(command(copy, "report", "report.compare_with=[exp/none]")) == 2
    assert "report.compare_with: exp/none" in capsys.readouterr().err


def test_published_rows_are_shown_for_phone_vocabularies_only(copy, capsys):
    for folder in ("targets", "systems", "report"):
        shutil.rmtree(copy / folder)
    capsys.readouterr()
    assert run.main(command(copy, "all", "targets.vocabulary=kana")) == 0
    assert "paper" not in capsys.readouterr().out
    assert "published: paper" not in (copy / "report/report.html").read_text(encoding="utf-8")
    assert "Recognition on test" in (copy / "report/table.txt").read_text()


def test_language_models_of_the_training_targets_are_used_in_decoding(copy):
    phones, words, lexicon = (str(copy / name) for name in ("phones.arpa", "words.arpa", "words.txt"))
    assert cli.main(["ngram", str(copy), "--unit", "phone", "--order", "3", "-o", phones]) == 0
    assert cli.main(["ngram", str(copy), "--unit", "word", "-o", words, "--lexicon", lexicon]) == 0
    assert cli.main(["ngram", str(copy), "--unit", "kana", "-o", words]) == 2
    assert Path(lexicon).read_text(encoding="utf-8") == "あめ\ta m e\nアイ\ta i\n"
    tuning = ["decode.tune_splits=[dev]", "decode.tune_lm_weights=[0.3,2]", "decode.tune_word_bonuses=[0,1]"]
    assert run.main(command(copy, "decode", "decoding=phones", f"decode.lm={phones}", *tuning)) == 0
    use_words = [f"decode.lm={words}", f"decode.lexicon={lexicon}", "decode.n_best=2"]
    assert run.main(command(copy, "decode", "decoding=words", *use_words)) == 0
    baseline = f"score.baseline={copy}/systems/main/decode"
    assert run.main(command(copy, "score", "decoding=words", baseline)) == 0
    system = copy / "systems/main"
    points = json.loads((system / "decode-phones/tuning.json").read_text())
    assert len(points) == 4 and points[0]["rate"] == min(point["rate"] for point in points)
    metrics = read_record(system / f"decode-phones/{DONE}")["metrics"]
    assert (metrics["lm_weight"], metrics["word_bonus"]) == (points[0]["lm_weight"], points[0]["word_bonus"])
    assert metrics["search"] == "beam 2, n-gram"
    for line in (system / "decode-words/test.jsonl").read_text(encoding="utf-8").splitlines():
        hypothesis = json.loads(line)
        spelled = {"アイ": "a i", "あめ": "a m e"}
        assert [spelled[word] for word in hypothesis["written"]] == hypothesis["hypothesis"]
    assert "against" in json.loads((system / "score-words/scores.json").read_text())["test"]
