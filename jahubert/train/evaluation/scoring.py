"""Scoring of hypotheses: error rates per set, talk and speaker, confusions, and text alignments."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.inference.confidence import WordFeatures
from jahubert.phonemes import PhonemeSet, phones_to_kana
from jahubert.train.data.targets import vocabulary_kind
from jahubert.train.evaluation.metrics import ErrorCounts, align, bootstrap_interval, count_errors
from jahubert.train.text.japanese import text_to_words
from jahubert.train.text.normalization import is_punctuation, recognized_characters
from jahubert.train.text.tokens import written_form

Words = list[tuple[str, ...]]


@dataclass(frozen=True)
class ScoredUtterance:
    """An utterance with its reference and its best hypothesis."""

    id: str
    talk: str
    speaker: str
    reference: Words
    hypothesis: Words
    word_features: tuple[WordFeatures, ...] | None = None  # features of each word of the hypothesis
    # Text of the corpus, and words of the hypothesis as written in the lexicon; None without a lexicon.
    reference_text: str | None = None
    written: list[str] | None = None


def read_hypotheses(path: Path) -> Iterator[ScoredUtterance]:
    """Iterate over the utterances in a hypothesis file written by the decode stage."""
    for line in path.read_bytes().splitlines():  # ids may contain Unicode line separators
        item = json.loads(line)
        features = item.get("word_features")
        yield ScoredUtterance(
            id=item["id"],
            talk=item["talk"],
            speaker=item["speaker"],
            reference=[tuple(word.split(" ")) for word in item["reference"]],
            hypothesis=[tuple(word.split(" ")) for word in item["hypothesis"]],
            word_features=None if features is None else tuple(WordFeatures(*values) for values in features),
            reference_text=item.get("reference_text"),
            written=item.get("written"),
        )


@dataclass(frozen=True)
class Measure:
    """Definition of an error rate."""

    name: str
    title: str
    # Function from an utterance to the compared items of its reference and of its hypothesis
    items: Callable[[ScoredUtterance], tuple[Sequence[Any], Sequence[Any]]]
    normalizer: str  # description of the normalization


def _measure(name: str, title: str, of_words: Callable[[Words], Sequence[Any]], normalizer: str) -> Measure:
    """Create a measure whose items are computed by `of_words` from the words in the vocabulary."""

    def items(utterance: ScoredUtterance) -> tuple[Sequence[Any], Sequence[Any]]:
        return of_words(utterance.reference), of_words(utterance.hypothesis)

    return Measure(name, title, items, normalizer)


def _symbols(words: Words) -> list[str]:
    return [symbol for word in words for symbol in word]


def _word_measure(symbols: str) -> Measure:
    normalizer = f"words as tuples of {symbols}, compared as a whole; no other normalization"
    return _measure("wer", "WER", lambda words: words, normalizer)


def _without_punctuation(words: Words) -> list[str]:
    return [symbol for symbol in _symbols(words) if not is_punctuation(symbol)]


def _texts(utterance: ScoredUtterance) -> tuple[str, str]:
    """Return the compared characters of the texts, or two empty texts if the utterance has no text."""
    if not has_text(utterance):
        return "", ""
    reference, hypothesis = utterance.reference_text or "", "".join(utterance.written or ())
    with suppress(DataError):  # a word of either text has no reading
        reference, hypothesis = _lexicon_spelling(reference), _lexicon_spelling(hypothesis)
    return recognized_characters(reference), recognized_characters(hypothesis)


def _lexicon_spelling(text: str) -> str:
    """Spell a text as the words of a lexicon, that is, with numbers in kanji: 2人 becomes 二人."""
    return "".join(written_form(word) for word in text_to_words(text)) if text else ""


def has_text(utterance: ScoredUtterance) -> bool:
    """Return whether the text CER of an utterance can be computed."""
    return bool(utterance.written is not None and recognized_characters(utterance.reference_text or ""))


_CHARACTERS = "NFKC, letters and digits only, without spaces"
_CER = _measure("cer", "CER", _without_punctuation, _CHARACTERS)
TEXT_CER = Measure(
    "text_cer",
    "text CER",
    _texts,
    f"words of the lexicon and text of the corpus, both with numbers in kanji; {_CHARACTERS}",
)

# Measures for each vocabulary. The phones of a word are not joined, because k y o and ky o would be equal.
MEASURES: dict[str, tuple[Measure, ...]] = {
    "phones": (
        _word_measure("phones"),
        _measure("per", "PER", _symbols, "phones without word boundaries; no other normalization"),
        _measure(
            "kana_cer",
            "kana CER",
            lambda words: "".join(phones_to_kana(word) for word in words),
            "katakana written from the phones (ー for every long vowel), without spaces",
        ),
    ),
    "kana": (
        _word_measure("kana"),
        _measure(
            "kana_cer", "kana CER", _symbols, "katakana as pronounced (ー for long vowels), without spaces"
        ),
    ),
    "characters": (_CER,),
    "characters with punctuation": (
        _CER,
        _measure(
            "cer_punctuation",
            "CER with punctuation",
            _symbols,
            "NFKC, letters, digits and punctuation marks, without spaces",
        ),
    ),
}
_TITLES = {measure.name: measure.title for group in (*MEASURES.values(), (TEXT_CER,)) for measure in group}


def measure_titles(*scores: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the measures that at least one score has, by name.

    The order is the one of `MEASURES`, with `TEXT_CER` last. Other keys of the scores are ignored.
    """
    return {name: title for name, title in _TITLES.items() if any(name in score for score in scores)}


def measures_for(symbols: PhonemeSet) -> tuple[Measure, ...]:
    """Return the measures for a vocabulary."""
    kind = vocabulary_kind(symbols)
    if kind == "characters" and any(is_punctuation(symbol) for symbol in symbols.symbols):
        kind = "characters with punctuation"
    return MEASURES[kind]


@dataclass
class SetScore:
    """The errors in every utterance of a set, for each measure.

    If any utterance has a text and was decoded with a lexicon, `TEXT_CER` is added to the measures.
    Utterances without a text do not count for it.

    Args:
        vocabulary_measures: measures for the vocabulary (see `measures_for`).

    Attributes:
        counts: errors in each utterance, by the name of the measure.
    """

    utterances: list[ScoredUtterance]
    vocabulary_measures: tuple[Measure, ...]
    measures: tuple[Measure, ...] = field(init=False)
    counts: dict[str, list[ErrorCounts]] = field(init=False)

    def __post_init__(self) -> None:
        text = (TEXT_CER,) if any(map(has_text, self.utterances)) else ()
        self.measures = (*self.vocabulary_measures, *text)
        self.counts = {
            measure.name: [count_errors(*measure.items(utterance)) for utterance in self.utterances]
            for measure in self.measures
        }

    @property
    def has_phones(self) -> bool:
        """Whether words consist of phones, which are displayed as kana."""
        return self.vocabulary_measures is MEASURES["phones"]

    def rates(self, seed: int, n_samples: int) -> dict[str, Any]:
        """Compute the rate, counts, bootstrap interval and normalizer of each measure for the whole set."""
        result = {}
        for measure in self.measures:
            counts = self.counts[measure.name]
            low, high = bootstrap_interval(
                [c.errors for c in counts], [c.length for c in counts], seed=seed, n=n_samples
            )
            interval = {"low": low, "high": high, "normalizer": measure.normalizer}
            result[measure.name] = _totals(counts) | interval
        return result

    def by(self, key: Callable[[ScoredUtterance], str]) -> dict[str, Any]:
        """Compute each measure for groups of utterances, for example per talk or per speaker."""
        groups: dict[str, list[int]] = {}
        for number, utterance in enumerate(self.utterances):
            groups.setdefault(key(utterance), []).append(number)
        return {
            name: {"utterances": len(members)}
            | {measure: _totals([counts[i] for i in members]) for measure, counts in self.counts.items()}
            for name, members in sorted(groups.items())
        }

    def confusions(self, n: int) -> dict[str, list[tuple[str, str, int]]]:
        """Return the `n` most frequent errors for each measure, as (reference, hypothesis, count).

        The reference is "" in an insertion, and the hypothesis is "" in a deletion.
        """
        result = {}
        for measure in self.measures:
            counter: Counter[tuple[str, str]] = Counter()
            for utterance in self.utterances:
                pairs = align(*measure.items(utterance))
                counter.update((_item_text(a), _item_text(b)) for a, b in pairs if a != b)
            most_frequent = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:n]
            result[measure.name] = [(a, b, count) for (a, b), count in most_frequent]
        return result


def _totals(counts: Sequence[ErrorCounts]) -> dict[str, Any]:
    total = sum(counts, ErrorCounts(0, 0, 0, 0))
    return {
        "rate": total.rate,
        "errors": total.errors,
        "length": total.length,
        "substitutions": total.substitutions,
        "insertions": total.insertions,
        "deletions": total.deletions,
    }


def _item_text(item: Any) -> str:
    """Format a word or symbol as text. The missing side of an insertion or deletion becomes ""."""
    if item is None:
        return ""
    return item if isinstance(item, str) else " ".join(item)


# --- text output ------------------------------------------------------------------------------------------


def published_table(
    published: Mapping[str, Mapping[str, float]], results: Sequence[tuple[str, Mapping[str, float]]]
) -> str:
    """Format published WERs and `results` (name, WER by set) as a table with one column per published set.

    Return an empty string if there are no published rows, or no results on their sets.
    """
    shared = {split for row in published.values() for split in row}
    results = [(f"here: {name}", row) for name, row in results if shared & row.keys()]
    if not published or not results:
        return ""
    rows = [*((f"published: {name}", row) for name, row in published.items()), *results]
    sets = sorted(shared)
    width = max(len(name) for name, _ in rows)
    lines = [
        "WER (%) compared with published results",
        f"  {'':<{width}}" + "".join(f"{split:>9}" for split in sets),
    ]
    for name, row in rows:
        cells = (f"{row[split]:>9.2f}" if split in row else f"{'-':>9}" for split in sets)
        lines.append(f"  {name:<{width}}" + "".join(cells))
    return "\n".join(lines) + "\n"


def phone_wer(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the WER (%) of each set whose symbols are phones, for comparison with published WERs."""
    return {split: 100 * score["wer"]["rate"] for split, score in scores.items() if "per" in score}


def rates_table(scores: Mapping[str, Any]) -> str:
    """Format all measures of all sets with their intervals, and comparisons with the baseline if any."""
    lines = []
    for split, score in scores.items():
        lines.append(f"{split}: {score['utterances']} utterances")
        titles = measure_titles(score)
        width = max(map(len, titles.values()), default=0) + 1
        for name, title in titles.items():
            rate = score[name]
            interval = f"[{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"
            lines.append(
                f"  {title:<{width}}{100 * rate['rate']:>7.2f} % {interval:<17} {rate['normalizer']}"
            )
        if measured := score.get("confidence"):
            accuracy, mean, error = (
                f"{100 * measured[name]:.1f} %" for name in ("accuracy", "confidence", "calibration_error")
            )
            auc = "" if measured["auc"] is None else f", AUC {measured['auc']:.3f}"
            lines.append(
                f"  confidence: mean {mean} of {measured['words']} words, of which {accuracy} are correct, "
                f"calibration error {error}{auc}"
            )
        against = score.get("against", {})
        for name, title in measure_titles(against).items():
            test = against[name]
            interval = f"[{100 * test['low']:+.2f}, {100 * test['high']:+.2f}]"
            lines.append(
                f"  {title}: {100 * test['difference']:+.2f} {interval} compared with the baseline's "
                f"{100 * test['baseline']:.2f} %, p = {test['p']:.3f}"
            )
    return "\n".join(lines) + "\n"


def details(split: str, score: Mapping[str, Any], set_score: SetScore) -> Iterator[str]:
    """Yield the lines of the text report: rates, talks, speakers, confusions and aligned utterances."""
    yield from rates_table({split: score}).splitlines()
    for title, groups in (("talk", score["talks"]), ("speaker", score["speakers"])):
        if 1 < len(groups) < len(set_score.utterances):
            yield ""
            yield f"By {title}"
            for name, group in groups.items():
                rates = "  ".join(
                    f"{measure} {100 * group[key]['rate']:.2f} %"
                    for key, measure in measure_titles(group).items()
                )
                yield f"  {_pad(name, 24)}{group['utterances']:>6} utterances  {rates}"
    for measure in set_score.measures:
        as_kana = set_score.has_phones and measure.name == "wer"
        if rows := score["confusions"][measure.name]:
            yield ""
            yield f"Most frequent errors, {measure.title} (reference, hypothesis, count)"
            for reference, hypothesis, count in rows:
                cells = (display_text(symbols, as_kana) for symbols in (reference, hypothesis))
                yield "  " + "".join(_pad(cell, 24) for cell in cells) + f"{count:>6}"
    yield ""
    yield "Utterances (S: substitution, D: deletion, I: insertion)"
    first = set_score.measures[0]
    for utterance, counts in zip(set_score.utterances, set_score.counts[first.name], strict=True):
        yield ""
        yield f"{utterance.id}  {first.title} {counts.errors}/{counts.length}"
        yield from aligned_lines(utterance.reference, utterance.hypothesis, set_score.has_phones)


def aligned_lines(reference: Words, hypothesis: Words, as_kana: bool) -> Iterator[str]:
    """Yield the reference and the hypothesis in aligned columns, and a line that marks errors, if any."""
    columns = []
    for a, b in align(reference, hypothesis):
        mark = "" if a == b else "I" if a is None else "D" if b is None else "S"
        columns.append((display_text(_item_text(a), as_kana), display_text(_item_text(b), as_kana), mark))
    widths = [max(_width(text) for text in column) + 2 for column in columns]
    for row, title in enumerate(("reference", "hypothesis", "")):
        cells = [_pad(column[row], width) for column, width in zip(columns, widths, strict=True)]
        line = f"  {title:<12}{''.join(cells)}".rstrip()
        if line:
            yield line


def display_text(symbols: str, as_kana: bool) -> str:
    """Format a word or symbol for display, as kana or joined symbols, or as `***` if it is missing."""
    if not symbols:
        return "***"
    parts = symbols.split(" ")
    return phones_to_kana(parts) if as_kana else "".join(parts)


def _width(text: str) -> int:
    """Return the number of terminal columns of a text. Wide characters occupy two columns."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
