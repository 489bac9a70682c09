"""Tests of the report page: both languages, units at equal K, examples, and several experiments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jahubert.audio import AudioSource
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.manifest import Manifest, Phone, Utterance, write_manifest
from jahubert.train.evaluation.metrics import ErrorCounts, count_errors
from jahubert.train.report import html
from jahubert.train.report.examples import Example, find_examples
from jahubert.train.report.html import PageData, render_page
from jahubert.train.report.markup import Strings
from jahubert.train.report.results import name_experiments
from jahubert.train.report.tables import text_tables
from jahubert.train.report.units import LayerQuality, UnitCounts, phone_times


def quality(pnmi: float, n_units: int = 100) -> dict:
    return {"pnmi": pnmi, "phone_purity": pnmi, "cluster_purity": 0.1, "n_units": n_units}


def rates(per: float) -> dict:
    rate = {"rate": per, "low": per / 2, "high": 2 * per, "normalizer": "none"}
    speakers = {"<anna>": {"utterances": 3, "wer": rate, "per": rate, "kana_cer": rate}}
    confusions = {"wer": [("k i", "k u", 2), ("", "o:", 1)], "per": [("i", "", 3)], "kana_cer": []}
    measures = {"wer": rate, "per": rate, "kana_cer": rate}
    return {"utterances": 3, **measures, "speakers": speakers, "confusions": confusions}


def system(per: float) -> dict:
    return {"label": "x", "hours": 1.0, "updates": 100, "utterances": 9, "scores": {"test": rates(per)}}


def make_experiment(exp: Path, lr: float = 1e-3) -> Path:
    (exp / "systems/main/finetune").mkdir(parents=True)
    record = {
        "fingerprint": "a" * 64,
        "settings": {"train.lr": lr, "manifest": "b" * 64, "<evil>": 1},
        "seconds": 90.0,
        "finished": "2026-01-01T00:00:00Z",
        "made_with": {"jahubert": "1", "torch": "2", "python": "3", "device": "GPU X", "command": "run a<b"},
    }
    (exp / "systems/main/finetune/provenance.json").write_text(json.dumps(record))
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    lines = [*map(json.dumps, rows), '{"step": 3, "lo']  # a running process is writing the last line
    (exp / "systems/main/finetune/metrics.jsonl").write_text("\n".join(lines))
    return exp


def page(
    exp: Path, others: tuple[Path, ...] = (), language: str = "en", layers: LayerQuality | None = None
) -> str:
    unit = {"pretrained_on": True, "feature": "hubert", "layer": 6, "used": 9, **quality(0.5, 500)}
    mfcc = unit | {"feature": "mfcc", "layer": None} | quality(0.4)
    summary = {
        "systems": {"main": system(0.1)} | {f"{other.name}: main": system(0.2) for other in others},
        "published": {"paper": {"test": 7.5}},
        "units": {"iter1": mfcc, "iter2": unit},
        "others": {other.name: {"units": {"iter1": mfcc}} for other in others},
        "corpus": {"hours": 2.0},
    }
    counts = UnitCounts({"iter1": np.ones(9, int)}, ["a", "b"], "corpus", {"iter1": np.eye(2, dtype=int)})
    return render_page(PageData(name_experiments(exp, others), summary, counts, layers, {}), language)


def layers(best: float) -> LayerQuality:
    return LayerQuality(900, quality(0.4), {"iter1": [quality(0.1)] * 5 + [quality(best)]})


def test_strings_have_the_same_placeholders_in_both_languages():
    texts = json.loads(Path(html.__file__).with_name("strings.json").read_text(encoding="utf-8"))
    for key, (english, japanese) in texts.items():
        for mark in "{}", "{k}", "{layer}", "{mfcc}", "{pnmi}", "{frames}":
            assert english.count(mark) == japanese.count(mark), key
    assert Strings("ja").duration(30) != Strings("en").duration(30)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_page_is_escaped_and_has_command_and_device(tmp_path, language):
    text = page(make_experiment(tmp_path / "a"), language=language)
    assert f'<html lang="{language}">' in text and "run a&lt;b" in text and "GPU X" in text
    assert "&lt;evil&gt;" in text and "<evil>" not in text and "&lt;anna&gt;" in text
    assert "prefers-color-scheme:dark" in text


def test_units_are_compared_at_equal_k(tmp_path):
    exp = make_experiment(tmp_path / "a")
    strings = Strings("en")
    above, below = page(exp, layers=layers(0.6)), page(exp, layers=layers(0.3))
    values = {"layer": "iter1, layer 6", "mfcc": "0.400"}
    assert strings("layer_above", pnmi="0.600", **values) in above
    assert strings("layer_below", pnmi="0.300", **values) in below
    assert strings("unequal_k_note") in above  # the iterations have K = 100 and 500
    assert strings("pnmi_equal_k", k=100, **values) in above
    assert "statement" not in page(exp).partition("<body>")[2]


def test_units_without_phone_times_have_no_quality_columns():
    unit = {"pretrained_on": True, "feature": "hubert", "layer": 6, "used": 9, "n_units": 500}
    measured = unit | quality(0.5, 500)
    strings = Strings("en")
    assert html._units_table({"iter2": unit}, strings).count("<th>") == 3
    both = html._units_table({"iter1": unit, "iter2": measured}, strings)
    assert both.count("<th>") == both.count("<td") / 2 == 6


def test_text_cer_has_a_column_if_a_system_has_it(tmp_path):
    summary = {"systems": {"plain": system(0.1), "lexicon": system(0.1)}, "units": {}, "published": {}}
    assert "text CER" not in text_tables(summary)
    rate = {"rate": 0.4321, "low": 0.4, "high": 0.5, "normalizer": "letters"}
    summary["systems"]["lexicon"]["scores"]["test"]["text_cer"] = rate
    lines = text_tables(summary).splitlines()
    assert any("text CER %" in line for line in lines)
    assert [line.split()[0] for line in lines if "43.21" in line] == ["lexicon"]


def test_ids_with_unicode_line_separators_are_read(tmp_path):
    path = tmp_path / "systems/main/decode/alignment.jsonl"
    path.parent.mkdir(parents=True)
    line = {"row": 0, "id": "a\u2028b\x85c", "phones": [["a", 0, 320]]}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    write_manifest(tmp_path / "m.arrow", [Utterance("a\u2028b\x85c", AudioSource("/a.wav"), n_samples=320)])
    times, source = phone_times(tmp_path, Manifest(tmp_path / "m.arrow"))
    assert times == {0: (Phone("a", 0, 320),)} and "main" in source


def test_alignment_of_another_decoding_is_used(tmp_path):
    path = tmp_path / "systems/main/decode-align/alignment.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"row": 0, "id": "a", "phones": [["a", 0, 320]]}) + "\n")
    write_manifest(tmp_path / "m.arrow", [Utterance("a", AudioSource("/a.wav"), n_samples=320)])
    times, source = phone_times(tmp_path, Manifest(tmp_path / "m.arrow"))
    assert times == {0: (Phone("a", 0, 320),)} and "main" in source


def test_several_experiments_are_compared(tmp_path):
    first, second = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b", lr=2e-3)
    text = page(first, (second,))
    assert 'id="comparison"' in text and "systems/main/finetune: train.lr" in text and "0.002" in text
    assert "b: iter1: MFCC" in text and "b: main" in text
    assert 'id="comparison"' not in page(first)


def test_experiments_with_equal_names_stay_apart(tmp_path):
    names = name_experiments(tmp_path / "x/a", [tmp_path / "y/a", tmp_path / "z/b"])
    assert list(names) == [str(tmp_path / "x/a"), str(tmp_path / "y/a"), "b"]


def test_aligned_words_are_one_above_the_other_with_both_error_rates():
    pairs = [(("a",), ("a",)), (("k", "i"), ("k", "u")), (None, ("o:",)), (("e",), None)]
    errors = {
        "per": count_errors(["a", "k", "i", "e"], ["a", "k", "u", "o:"]),
        "wer": ErrorCounts(hits=1, substitutions=1, insertions=1, deletions=1),
    }
    example = Example("u1", "test", "text", 1.0, errors, pairs, pairs, True)
    page = html._examples({"main": {"worst": [example]}}, Strings("en"))
    assert "PER 50 % (2/4)" in page and "WER 100 % (3/3)" in page
    columns = re.findall(r'<span><span class="(\w*)">(.*?)</span><span class="\w*">(.*?)</span></span>', page)
    assert columns == [("", "ア", "ア"), ("sub", "キ", "ク"), ("ins", "–", "オー"), ("del", "エ", "–")]


def test_examples_are_worst_median_and_best(tmp_path, monkeypatch):
    monkeypatch.setattr("jahubert.train.report.examples._example", lambda decoded, *_: decoded.utterance.id)
    (tmp_path / "phonemes.json").write_text(json.dumps(PhonemeSet.standard().to_json()))
    lines = []
    for n in range(9):
        reference, hypothesis = "a " * 10, "a " * (10 - n)
        words = {"reference": [reference.strip()], "hypothesis": [hypothesis.strip()]}
        lines.append({"id": f"u{n}", "talk": "t", "speaker": "s", **words})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    groups = find_examples(tmp_path, None, {}, None, 2)
    assert groups == {"worst": ["u8", "u7"], "median": ["u5", "u4"], "best": ["u0", "u1"]}
    groups = find_examples(tmp_path, None, {}, None, 4)
    assert groups == {
        "worst": ["u8", "u7", "u6", "u5"],
        "median": ["u4"],
        "best": ["u0", "u1", "u2", "u3"],
    }
