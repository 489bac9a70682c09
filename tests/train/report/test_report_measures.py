"""Tests of the error rates in the report, which depend on the vocabulary and the lexicon of each system."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from jahubert.audio import AudioSource
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.data.targets import character_set, kana_set
from jahubert.train.evaluation.scoring import MEASURES, TEXT_CER, ScoredUtterance, SetScore, measures_for
from jahubert.train.report import html
from jahubert.train.report.examples import find_examples
from jahubert.train.report.markup import Strings
from jahubert.train.report.tables import text_tables
from jahubert.train.report.units import UnitCounts
from jahubert.train.stages.score import Config, score_set

PUNCTUATION_CER = "CER with punctuation"
# Vocabulary, reference and hypothesis as words, and the expected rates (%) by measure
SYSTEMS = {
    "phones": (
        PhonemeSet.standard(),
        [("k", "i"), ("o:",)],
        [("k", "u"), ("o:",)],
        {"WER": "50.00", "PER": "33.33", "kana CER": "33.33"},
    ),
    "kana": (
        kana_set(),
        [("キ",), ("オ", "ー")],
        [("ク",), ("オ", "ー")],
        {"WER": "50.00", "kana CER": "33.33"},
    ),
    "characters": (character_set("今日雨"), [("今",), ("日",)], [("今",), ("雨",)], {"CER": "50.00"}),
    "punctuation": (
        character_set("今日雨、。"),
        [("今",), ("日",), ("。",)],
        [("今",), ("日",), ("、",)],
        {"CER": "0.00", PUNCTUATION_CER: "33.33"},
    ),
    "lexicon": (
        PhonemeSet.standard(),
        [("k", "i"), ("o:",)],
        [("k", "u"), ("o:",)],
        {"WER": "50.00", "PER": "33.33", "kana CER": "33.33", "text CER": "100.00"},
    ),
}
ORDER = ["WER", "PER", "kana CER", "CER", PUNCTUATION_CER, "text CER"]


def summary(*names: str) -> dict:
    """Return the summary of a report on scored systems with one utterance each."""
    systems = {}
    for name in names:
        symbols, reference, hypothesis, _ = SYSTEMS[name]
        texts = {"reference_text": "木", "written": ["区"]} if name == "lexicon" else {}
        utterance = ScoredUtterance("u", "talk", "anna", reference, hypothesis, **texts)
        score = score_set(SetScore([utterance], measures_for(symbols)), Config(Path("decode"), samples=10))
        systems[name] = {"label": name, "hours": 1.0, "updates": 100, "scores": {"test": score}}
    return {"systems": systems, "published": {"paper": {"test": 7.5}}, "units": {}}


def text_table(summary: dict) -> dict[str, dict[str, str]]:
    """Return the rates (%) in the text table, by system and by measure. "-" means that there is none."""
    lines = text_tables(summary).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("Recognition on test"))
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :] if line[:1] == " ")
    titles = [title.removesuffix(" %") for title in header[3:]]
    return {
        name: dict(zip(titles, [cell.partition(" ")[0] for cell in cells], strict=True))
        for name, _, _, *cells in rows
    }


def html_tables(page: str) -> list[tuple[list[str], list[list[str]]]]:
    """Return the header and the rows of each table of a page, without markup and intervals."""
    page = re.sub("<small>.*?</small>", "", page)
    tables = []
    for content in re.findall("<table.*?</table>", page):
        rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", content)]
        plain = [[re.sub("<.*?>|&nbsp;", "", cell).strip() for cell in row] for row in rows]
        tables.append((plain[0], plain[1:]))
    return tables


def results(summary: dict, language: str = "en") -> str:
    page = html.PageData({"exp": Path("exp")}, summary, UnitCounts({}, [], "", {}), None, {})
    return html._results(page, Strings(language))


@pytest.mark.parametrize("names", [*((name,) for name in SYSTEMS), tuple(SYSTEMS), tuple(SYSTEMS)[::-1]])
def test_tables_have_a_column_for_each_measure(names: Sequence[str]):
    expected = {name: SYSTEMS[name][-1] for name in names}
    columns = [title for title in ORDER if any(title in rates for rates in expected.values())]

    table = text_table(summary(*names))
    assert list(next(iter(table.values()))) == columns
    assert table == {name: {title: expected[name].get(title, "-") for title in columns} for name in names}

    header, rows = html_tables(results(summary(*names)))[0]
    assert header[3:] == [f"{title} %" for title in columns]
    wers = {row[0]: row[3:] for row in rows}
    has_phones = "phones" in names or "lexicon" in names
    assert wers.pop("published: paper", None) == (
        ["7.50" if title == "WER" else "" for title in columns] if has_phones else None
    )
    assert wers == {name: [expected[name].get(title, "") for title in columns] for name in names}


@pytest.mark.parametrize("name", SYSTEMS)
def test_speakers_and_errors_have_the_measures_of_the_system(name):
    tables = html_tables(results(summary(name)))
    rates = SYSTEMS[name][-1]
    assert tables[1] == (
        ["speaker", "utterances", *(f"{title} %" for title in rates)],
        [["anna", "1", *rates.values()]],
    )
    headings = re.findall("<h4>(.*?)</h4>", results(summary(name)))
    assert headings == [title for title, rate in rates.items() if float(rate)]
    assert len(tables) == 2 + len(headings)


def test_normalizers_of_all_vocabularies_are_in_the_text_report():
    text = text_tables(summary("kana", "phones", "punctuation"))
    for kind in ("kana", "phones", "characters with punctuation"):
        for measure in MEASURES[kind]:
            assert f"{measure.title}: {measure.normalizer}" in text.splitlines()


def test_words_are_only_explained_if_there_is_a_wer():
    for language in "en", "ja":
        note = Strings(language)("wer_note")
        assert note in results(summary("characters", "kana"), language)
        assert note not in results(summary("characters"), language)


def test_titles_are_the_same_in_the_page_and_in_the_text_tables():
    strings = Strings("en")
    for measure in {TEXT_CER, *(measure for group in MEASURES.values() for measure in group)}:
        assert strings.get(measure.name, measure.title) == measure.title


@pytest.mark.parametrize("name", ["phones", "kana", "characters", "punctuation"])
def test_examples_have_the_measures_of_the_vocabulary(tmp_path, name):
    symbols, reference, hypothesis, rates = SYSTEMS[name]
    (tmp_path / "phonemes.json").write_text(json.dumps(symbols.to_json()))
    words = {"reference": reference, "hypothesis": hypothesis}
    line = {"id": "u", "talk": "talk", "speaker": "anna"}
    line |= {side: [" ".join(word) for word in content] for side, content in words.items()}
    (tmp_path / "test.jsonl").write_text(json.dumps(line) + "\n")
    source = AudioSource(str(tmp_path / "missing.wav"))
    write_manifest(tmp_path / "m.arrow", [Utterance("u", source, n_samples=16_000, split="test")])
    groups = find_examples(tmp_path, Manifest(tmp_path / "m.arrow"), {}, None, 1)
    page = html._examples({name: groups}, Strings("en"))
    found = re.findall(r"([\w ]+?) (\d+) % \(\d+/\d+\)", re.search('<p class="note">(u .*?)</p>', page)[1])
    assert {title.strip(): float(rate) for title, rate in found} == pytest.approx(
        {title: float(rate) for title, rate in rates.items()}, abs=0.5
    )
