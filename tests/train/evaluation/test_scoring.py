"""Tests of scores by talk and speaker, confusions, aligned text, and the paired bootstrap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jahubert.errors import DataError
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.targets import character_set, kana_set
from jahubert.train.evaluation.metrics import bootstrap_interval, count_errors, paired_bootstrap
from jahubert.train.evaluation.scoring import (
    MEASURES,
    TEXT_CER,
    ScoredUtterance,
    SetScore,
    aligned_lines,
    published_table,
)
from jahubert.train.stages import score as stage


def words(text: str) -> list[tuple[str, ...]]:
    return [tuple(word.split()) for word in text.split(" | ")] if text else []


LINES = [  # (talk, speaker, reference, hypothesis)
    ("T1", "anna", "k a | k i | o:", "k a | k u | o:"),
    ("T1", "bo", "k a", ""),
    ("T2", "anna", "s a k e", "s a k e | o:"),
    ("T2", "anna", "k a | k i", "k a | k u"),
]


def scored(lines=LINES, measures=MEASURES["phones"]) -> SetScore:
    return SetScore(
        [
            ScoredUtterance(f"u{i}", talk, who, words(a), words(b))
            for i, (talk, who, a, b) in enumerate(lines)
        ],
        measures,
    )


def test_rates_are_computed_by_set_talk_and_speaker():
    score = scored()
    rates = score.rates(0, 50)
    assert (rates["wer"]["errors"], rates["wer"]["length"]) == (4, 7)
    assert (rates["wer"]["substitutions"], rates["wer"]["insertions"], rates["wer"]["deletions"]) == (2, 1, 1)
    assert (rates["per"]["errors"], rates["per"]["length"]) == (5, 15)
    assert (rates["kana_cer"]["errors"], rates["kana_cer"]["length"]) == (5, 9)
    assert all(rates[name]["normalizer"] for name in ("wer", "per", "kana_cer"))
    talks, speakers = score.by(lambda item: item.talk), score.by(lambda item: item.speaker)
    assert {name: group["wer"]["errors"] for name, group in talks.items()} == {"T1": 2, "T2": 2}
    assert {name: group["utterances"] for name, group in speakers.items()} == {"anna": 3, "bo": 1}
    assert speakers["bo"]["wer"]["rate"] == 1
    for groups in (talks, speakers):
        for measure in ("wer", "per", "kana_cer"):
            assert sum(group[measure]["errors"] for group in groups.values()) == rates[measure]["errors"]


def test_confusions_are_sorted_by_frequency():
    confusions = scored().confusions(2)
    assert confusions["wer"] == [("k i", "k u", 2), ("", "o:", 1)]
    assert confusions["per"][0] == ("i", "u", 2)


def test_columns_of_aligned_lines_match():
    reference, hypothesis, marks = aligned_lines(words("k a | k i | o:"), words("k a | k u | o: | N"), True)
    assert reference.split() == ["reference", "カ", "キ", "オー", "***"]
    assert hypothesis.split() == ["hypothesis", "カ", "ク", "オー", "ン"]
    assert marks.split() == ["S", "I"]
    assert reference.index("キ") == hypothesis.index("ク")
    assert reference.index("キ") + 1 == marks.index("S")  # カ is two columns wide


def test_aligned_lines_without_errors_have_no_marks():
    assert len(list(aligned_lines(words("k a | k i"), words("k a | k i"), True))) == 2


def test_paired_bootstrap_detects_a_difference():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 300)
    errors, baseline = rng.binomial(lengths, 0.10), rng.binomial(lengths, 0.14)
    test = paired_bootstrap(errors, baseline, lengths)
    assert test.difference == pytest.approx((errors.sum() - baseline.sum()) / lengths.sum())
    assert test.low < test.difference < test.high < 0 and test.p < 0.01
    same = paired_bootstrap(errors, errors, lengths)
    assert (same.difference, same.p) == (0, 1)
    # Under the null hypothesis, p is uniformly distributed.
    below = 0
    for trial in range(200):
        a, b = (rng.binomial(20, 0.1, 100) for _ in range(2))
        below += paired_bootstrap(a, b, np.full(100, 20), seed=trial, n=200).p < 0.1
    assert 0.04 < below / 200 < 0.18
    with pytest.raises(DataError, match="paired bootstrap"):
        paired_bootstrap([1], [1, 2], [1])


def test_paired_bootstrap_is_more_sensitive_than_separate_intervals():
    """Errors that both systems make do not hide a small, consistent improvement."""
    rng = np.random.default_rng(1)
    hard = rng.random(400) ** 4
    baseline = rng.binomial(20, hard)
    errors = np.maximum(0, baseline - (rng.random(400) < 0.15))
    test = paired_bootstrap(errors, baseline, np.full(400, 20))
    low, high = bootstrap_interval(baseline, np.full(400, 20))
    assert test.high < 0 and -test.difference < high - low


def test_text_cer_does_not_depend_on_the_spelling_of_numbers():
    """The words of a lexicon have numbers in kanji."""
    pytest.importorskip("pyopenjtalk")
    for reference, written, errors in (
        (
            "2024年に100円の水を買った。",
            ["二千二十四", "年", "に", "百", "円", "の", "水", "を", "買っ", "た"],
            0,
        ),
        ("私は１人で行く", ["私", "は", "一人", "で", "帰る"], 2),
    ):
        item = ScoredUtterance("u", "t", "s", [], [], reference_text=reference, written=written)
        characters = TEXT_CER.items(item)
        assert count_errors(*characters).errors == errors, characters


def test_published_rows_come_before_own_results():
    published = {"paper": {"eval1": 9.3, "eval2": 7.07}}
    lines = published_table(published, [("main", {"eval1": 12.345, "other": 1.0})]).splitlines()
    assert lines[1].split() == ["eval1", "eval2"]
    assert lines[2].split() == ["published:", "paper", "9.30", "7.07"]
    assert lines[3].split() == ["here:", "main", "12.35", "-"]
    assert published_table(published, [("main", {"dev": 1.0})]) == ""  # no published set
    assert published_table({}, [("main", {"eval1": 1.0})]) == ""
    assert published_table(published, [("main", {})]) == ""  # no set of this system has phones


# --- score stage ------------------------------------------------------------------------------------------


def hypotheses(
    folder: Path, lines=LINES, symbols: PhonemeSet | None = None, texts: list[tuple[str, str]] | None = None
) -> Path:
    """Write hypotheses; `texts` contains the text of each utterance and the words from a lexicon."""
    folder.mkdir(parents=True)
    (folder / "phonemes.json").write_text(json.dumps((symbols or PhonemeSet.standard()).to_json()))
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number, (talk, speaker, reference, hypothesis) in enumerate(lines):
            row = {"id": f"u{number}", "talk": talk, "speaker": speaker, "score": -1.0}
            row |= {
                "reference": [" ".join(w) for w in words(reference)],
                "hypothesis": [" ".join(w) for w in words(hypothesis)],
            }
            if texts is not None:
                row |= {"reference_text": texts[number][0], "written": texts[number][1].split()}
            file.write(json.dumps(row) + "\n")
    return folder


def run(tmp_path: Path, name: str = "main", **settings) -> tuple[dict, Path]:
    out = tmp_path / name / "score"
    out.mkdir(parents=True, exist_ok=True)
    stage.run(stage.Config(**settings, samples=50), out)
    return json.loads((out / "scores.json").read_text()), out


def test_score_writes_json_and_text(tmp_path, capsys):
    better = [(talk, who, reference, reference) for talk, who, reference, _ in LINES]
    baseline = hypotheses(tmp_path / "other", better)
    scores, out = run(
        tmp_path,
        hypotheses=hypotheses(tmp_path / "decode"),
        baseline=baseline,
        published={"p": {"test": 5.0}},
    )
    test = scores["test"]["against"]["wer"]
    assert test["baseline"] == 0 and test["difference"] == pytest.approx(4 / 7)
    text = (out / "test.txt").read_text()
    for part in (
        "By talk",
        "By speaker",
        "Most frequent errors, WER",
        "u1  WER 1/1",
        "baseline's 0.00 %",
    ):
        assert part in text
    assert scores["test"]["wer"]["normalizer"] in text
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text() in printed
    # The row is labeled with the path of the decode folder, because the folder has no stage record.
    assert f"here: {tmp_path / 'decode'} " in printed and "57.14" in printed


def test_text_of_a_lexicon_is_compared_with_the_text_of_the_corpus(tmp_path, caplog):
    texts = [("傘、木、王。", "傘 菊 王"), ("蚊", ""), ("酒１本", "酒 1 本"), ("。", "傘 木")]
    folder = hypotheses(tmp_path / "lexicon", texts=texts)
    scores, out = run(tmp_path, hypotheses=folder, baseline=folder)
    found = scores["test"]["text_cer"]
    assert (found["errors"], found["length"], found["substitutions"], found["deletions"]) == (2, 7, 1, 1)
    assert scores["test"]["speakers"]["bo"]["text_cer"]["rate"] == 1
    assert scores["test"]["against"]["text_cer"]["difference"] == 0
    assert found["normalizer"] in (out / "table.txt").read_text()
    assert "1 of 4" in caplog.text  # the last utterance has no text


@pytest.mark.parametrize("lexicon_in_baseline", [False, True])
def test_text_cer_of_one_system_is_not_compared(lexicon_in_baseline, tmp_path, caplog):
    lexicon = hypotheses(tmp_path / "lexicon", texts=[("傘", "傘")] * len(LINES))
    plain = hypotheses(tmp_path / "plain")
    systems = (plain, lexicon) if lexicon_in_baseline else (lexicon, plain)
    scores, _ = run(tmp_path, hypotheses=systems[0], baseline=systems[1])
    assert "text_cer" not in scores["test"]["against"] and "per" in scores["test"]["against"]
    assert ("text_cer" in scores["test"]) != lexicon_in_baseline and "not compared" in caplog.text


def test_baseline_with_other_texts_is_rejected(tmp_path):
    folders = [hypotheses(tmp_path / text, texts=[(text, text)] * len(LINES)) for text in ("傘", "蚊")]
    with pytest.raises(DataError, match="u0"):
        run(tmp_path, hypotheses=folders[0], baseline=folders[1])


@pytest.mark.parametrize("texts", [None, [("", "傘")] * len(LINES)])
def test_without_texts_there_is_no_text_cer(tmp_path, texts):
    scores, _ = run(tmp_path, hypotheses=hypotheses(tmp_path / "decode", texts=texts))
    assert "text_cer" not in scores["test"] and "per" in scores["test"]


def test_measures_depend_on_vocabulary(tmp_path):
    kana = [("T", "a", "カ タ | ナ", "カ タ | ノ")]
    scores, _ = run(tmp_path, "kana", hypotheses=hypotheses(tmp_path / "k", kana, kana_set()))
    assert scores["test"]["wer"]["rate"] == 0.5 and scores["test"]["kana_cer"]["rate"] == pytest.approx(1 / 3)
    assert "per" not in scores["test"]
    text = [("T", "a", "今 | 日 | A", "今 | 目 | A")]
    scores, out = run(tmp_path, "text", hypotheses=hypotheses(tmp_path / "c", text, character_set("今日目A")))
    assert scores["test"]["cer"]["rate"] == pytest.approx(1 / 3) and "wer" not in scores["test"]
    assert "今  日  A" in (out / "test.txt").read_text()


def test_mismatched_baseline_is_rejected(tmp_path):
    folder = hypotheses(tmp_path / "decode")
    with pytest.raises(DataError, match="different utterances"):
        run(tmp_path, hypotheses=folder, baseline=hypotheses(tmp_path / "fewer", LINES[:2]))
    changed = [*LINES[:3], ("T2", "anna", "k a | k e", "k a")]
    with pytest.raises(DataError, match=r"references .*'u3'"):
        run(tmp_path, hypotheses=folder, baseline=hypotheses(tmp_path / "changed", changed))
    with pytest.raises(DataError, match="no hypotheses"):
        run(tmp_path, hypotheses=folder, baseline=tmp_path)
