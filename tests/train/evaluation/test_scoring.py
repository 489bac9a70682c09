"""Scores by talk and speaker, confusions, alignments to read, and the test between two systems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jahubert.errors import DataError
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.targets import character_set, kana_set
from jahubert.train.evaluation.metrics import align, count_errors, paired_bootstrap
from jahubert.train.evaluation.scoring import MEASURES, Scored, SetScore, aligned_lines, published_table
from jahubert.train.stages import score as stage


def words(text: str) -> list[tuple[str, ...]]:
    return [tuple(word.split()) for word in text.split(" | ")] if text else []


LINES = [  # talk, speaker, said, heard
    ("T1", "anna", "k a | k i | o:", "k a | k u | o:"),
    ("T1", "bo", "k a", ""),
    ("T2", "anna", "s a k e", "s a k e | o:"),
    ("T2", "anna", "k a | k i", "k a | k u"),
]


def scored(lines=LINES, measures=MEASURES["phones"]) -> SetScore:
    return SetScore(
        [Scored(f"u{i}", talk, who, words(a), words(b)) for i, (talk, who, a, b) in enumerate(lines)],
        measures,
    )


def test_pairs_follow_the_way_that_is_counted():
    rng = np.random.default_rng(0)
    for _ in range(100):
        said, heard = (list(rng.choice(list("aiue"), rng.integers(0, 8))) for _ in range(2))
        pairs, found = align(said, heard), count_errors(said, heard)
        assert [a for a, _ in pairs if a is not None] == said
        assert [b for _, b in pairs if b is not None] == heard
        assert sum(a is None for a, _ in pairs) == found.insertions
        assert sum(b is None for _, b in pairs) == found.deletions
        assert sum(a == b for a, b in pairs) == found.hits


def test_rates_of_a_set_of_talks_and_of_speakers_are_those_counted_by_hand():
    found = scored()
    rates = found.rates(0, 50)
    assert (rates["wer"]["errors"], rates["wer"]["length"]) == (4, 7)
    assert (rates["wer"]["substitutions"], rates["wer"]["insertions"], rates["wer"]["deletions"]) == (2, 1, 1)
    assert (rates["per"]["errors"], rates["per"]["length"]) == (5, 15)
    assert (rates["kana_cer"]["errors"], rates["kana_cer"]["length"]) == (5, 9)
    assert all(rates[name]["normaliser"] for name in ("wer", "per", "kana_cer"))
    talks, speakers = found.by(lambda item: item.talk), found.by(lambda item: item.speaker)
    assert {name: group["wer"]["errors"] for name, group in talks.items()} == {"T1": 2, "T2": 2}
    assert {name: group["utterances"] for name, group in speakers.items()} == {"anna": 3, "bo": 1}
    assert speakers["bo"]["wer"]["rate"] == 1
    for groups in (talks, speakers):
        for measure in ("wer", "per", "kana_cer"):
            assert sum(group[measure]["errors"] for group in groups.values()) == rates[measure]["errors"]


def test_the_most_frequent_errors_come_first():
    found = scored().confusions(2)
    assert found["wer"] == [("k i", "k u", 2), ("", "o:", 1)]
    assert found["per"][0] == ("i", "u", 2)


def test_an_alignment_lines_up():
    said, heard, marks = aligned_lines(words("k a | k i | o:"), words("k a | k u | o: | N"), kana=True)
    assert said.split() == ["said", "カ", "キ", "オー", "***"]
    assert heard.split() == ["heard", "カ", "ク", "オー", "ン"]
    assert marks.split() == ["S", "I"]
    assert len(said[: said.index("キ")]) == len(heard[: heard.index("ク")])
    assert len(said[: said.index("キ")]) + 1 == marks.index("S")  # カ is two columns wide


def test_without_a_difference_there_is_no_line_of_marks():
    assert len(list(aligned_lines(words("k a | k i"), words("k a | k i"), kana=True))) == 2


def test_a_paired_test_tells_a_difference_from_noise():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 300)
    ours, theirs = rng.binomial(lengths, 0.10), rng.binomial(lengths, 0.14)
    found = paired_bootstrap(ours, theirs, lengths)
    assert found.difference == pytest.approx((ours.sum() - theirs.sum()) / lengths.sum())
    assert found.low < found.difference < found.high < 0 and found.p < 0.01
    same = paired_bootstrap(ours, ours, lengths)
    assert (same.difference, same.p) == (0, 1)
    # Where nothing differs, p is as often below a level as the level says.
    below = 0
    for trial in range(200):
        a, b = (rng.binomial(20, 0.1, 100) for _ in range(2))
        below += paired_bootstrap(a, b, np.full(100, 20), seed=trial, n=200).p < 0.1
    assert 0.04 < below / 200 < 0.18
    with pytest.raises(DataError, match="no pairs"):
        paired_bootstrap([1], [1, 2], [1])


def test_a_paired_test_sees_more_than_two_intervals():
    """Errors that both make at the same utterances do not count against a small, steady gain."""
    rng = np.random.default_rng(1)
    hard = rng.random(400) ** 4
    theirs = rng.binomial(20, hard)
    ours = np.maximum(0, theirs - (rng.random(400) < 0.15))
    found = paired_bootstrap(ours, theirs, np.full(400, 20))
    alone = scored_interval(theirs)
    assert found.high < 0 and -found.difference < alone[1] - alone[0]


def scored_interval(errors: np.ndarray) -> tuple[float, float]:
    from jahubert.train.evaluation.metrics import bootstrap_interval

    return bootstrap_interval(errors, np.full(len(errors), 20))


def test_published_rows_stand_above_ours():
    published = {"paper": {"eval1": 9.3, "eval2": 7.07}}
    lines = published_table(published, [("main", {"eval1": 12.345, "other": 1.0})]).splitlines()
    assert lines[1].split() == ["eval1", "eval2"]
    assert lines[2].split() == ["published:", "paper", "9.30", "7.07"]
    assert lines[3].split() == ["here:", "main", "12.35", "-"]
    assert published_table({}, [("main", {"eval1": 1.0})]) == ""
    assert published_table(published, [("main", {})]) == ""  # words of kana or characters do not compare


# --- the stage --------------------------------------------------------------------------------------------


def hypotheses(folder: Path, lines=LINES, symbols: PhonemeSet | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "phonemes.json").write_text(json.dumps((symbols or PhonemeSet.standard()).to_json()))
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number, (talk, speaker, said, heard) in enumerate(lines):
            row = {"id": f"u{number}", "talk": talk, "speaker": speaker, "score": -1.0}
            row |= {
                "reference": [" ".join(w) for w in words(said)],
                "hypothesis": [" ".join(w) for w in words(heard)],
            }
            file.write(json.dumps(row) + "\n")
    return folder


def run(tmp_path: Path, name: str = "main", **settings) -> tuple[dict, Path]:
    out = tmp_path / name / "score"
    out.mkdir(parents=True, exist_ok=True)
    stage.run(stage.Config(**settings, samples=50), out)
    return json.loads((out / "scores.json").read_text()), out


def test_the_stage_writes_what_a_person_and_a_program_read(tmp_path, capsys):
    better = [(talk, who, said, said) for talk, who, said, _ in LINES]
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
        "WER less the baseline's 0.00 %",
    ):
        assert part in text
    assert scores["test"]["wer"]["normaliser"] in text
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text() in printed
    assert f"here: {tmp_path / 'decode'} " in printed and "57.14" in printed  # no record says what it is


def test_kana_and_characters_have_their_own_measures(tmp_path):
    kana = [("T", "a", "カ タ | ナ", "カ タ | ノ")]
    scores, _ = run(tmp_path, "kana", hypotheses=hypotheses(tmp_path / "k", kana, kana_set()))
    assert scores["test"]["wer"]["rate"] == 0.5 and scores["test"]["kana_cer"]["rate"] == pytest.approx(1 / 3)
    assert "per" not in scores["test"]
    text = [("T", "a", "今 | 日 | A", "今 | 目 | A")]
    scores, out = run(tmp_path, "text", hypotheses=hypotheses(tmp_path / "c", text, character_set("今日目A")))
    assert scores["test"]["cer"]["rate"] == pytest.approx(1 / 3) and "wer" not in scores["test"]
    assert "今  日  A" in (out / "test.txt").read_text()


def test_a_baseline_of_something_else_is_refused(tmp_path):
    ours = hypotheses(tmp_path / "decode")
    with pytest.raises(DataError, match="of other utterances"):
        run(tmp_path, hypotheses=ours, baseline=hypotheses(tmp_path / "fewer", LINES[:2]))
    changed = [*LINES[:3], ("T2", "anna", "k a | k e", "k a")]
    with pytest.raises(DataError, match="another reference for 'u3' and 0 more"):
        run(tmp_path, hypotheses=ours, baseline=hypotheses(tmp_path / "changed", changed))
    with pytest.raises(DataError, match="the baseline has no hypotheses of this set"):
        run(tmp_path, hypotheses=ours, baseline=tmp_path)
