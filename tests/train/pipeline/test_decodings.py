"""Tests of several decodings of one model and of reports that compare experiments."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import FIXTURES

from jahubert import run
from jahubert.cli import main as cli
from jahubert.train.experiment.provenance import DONE, read_record

REPO = Path(__file__).parents[3]
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
    """The same experiment with a second, greedy decoding that is compared with the first."""
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


def test_documented_word_list_commands_run(copy, capsys):
    """Runs the commands in the docstring of tools/word_list.py with a hand-written n-gram file."""
    pytest.importorskip("flashlight.lib.text.decoder")
    tool = REPO / "tools" / "word_list.py"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, str(tool), str(copy)], check=True, env=environment)
    assert (copy / "words/lexicon.txt").read_text(encoding="utf-8") == "アイ a i\nアメ a m e\n"
    single = "-2.0\t<unk>\n-99\t<s>\t-0.1\n-1.0\t</s>\n-0.5\tアイ\t-0.2\n"
    grams = f"\\1-grams:\n{single}\n\\2-grams:\n-0.1\t<s> アイ\n\n\\end\\\n"
    arpa = f"\\data\\\nngram 1=4\nngram 2=1\n\n{grams}"
    (copy / "words/3gram.arpa").write_text(arpa, encoding="utf-8")
    docstring = (
        tool.read_text(encoding="utf-8").split('"""')[1].replace("\\\n", " ").replace("exp/csj", str(copy))
    )
    commands = [shlex.split(line)[3:] for line in docstring.splitlines() if "jahubert.run" in line]
    assert len(commands) == 2
    for words in commands:
        stage = next(word.removeprefix("stage=") for word in words if word.startswith("stage="))
        rest = [word for word in words if not word.startswith(("recipe=", "stage="))]
        assert run.main(command(copy, stage, *rest)) == 0, capsys.readouterr().err
    system = copy / "systems/main"
    rows = [json.loads(line) for line in (system / "decode-words/test.jsonl").read_text().splitlines()]
    assert {word for row in rows for word in row["hypothesis"]} <= {"a i", "a m e"}
    assert "against" in json.loads((system / "score-words/scores.json").read_text())["test"]
