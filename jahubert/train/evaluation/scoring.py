"""What is compared when hypotheses are scored, and how it is shown: rates, talks, confusions, alignments."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jahubert.phonemes import phones_to_kana
from jahubert.train.evaluation.metrics import Errors, align, bootstrap_interval, count_errors

Words = list[tuple[str, ...]]


@dataclass(frozen=True)
class Measure:
    """A view of an utterance's words that is compared item by item, and how it was normalised for that."""

    name: str
    title: str
    view: Callable[[Words], Sequence]
    normaliser: str


def _flat(words: Words) -> list[str]:
    return [symbol for word in words for symbol in word]


def _words_of(symbols: str) -> Measure:
    normaliser = f"words as tuples of {symbols}, compared whole; nothing else changed"
    return Measure("wer", "WER", lambda words: words, normaliser)


# By vocabulary. Joined labels are ambiguous (k y o, ky o), so words stay tuples and phones stay lists.
MEASURES: dict[str, tuple[Measure, ...]] = {
    "phones": (
        _words_of("phones"),
        Measure("per", "PER", _flat, "phones without word boundaries; nothing else changed"),
        Measure(
            "kana_cer",
            "kana CER",
            lambda words: "".join(phones_to_kana(word) for word in words),
            "katakana written from the phones (ー for every long vowel), without spaces",
        ),
    ),
    "kana": (
        _words_of("kana"),
        Measure("kana_cer", "kana CER", _flat, "katakana as pronounced (ー for long vowels), without spaces"),
    ),
    "characters": (Measure("cer", "CER", _flat, "NFKC, letters and digits only, without spaces"),),
}


@dataclass(frozen=True)
class Scored:
    """An utterance with its reference and its best hypothesis."""

    id: str
    talk: str
    speaker: str
    said: Words
    heard: Words


@dataclass
class SetScore:
    """The errors of each utterance of a set, by measure."""

    utterances: list[Scored]
    measures: tuple[Measure, ...]
    counts: dict[str, list[Errors]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = {
            m.name: [count_errors(m.view(item.said), m.view(item.heard)) for item in self.utterances]
            for m in self.measures
        }

    @property
    def in_kana(self) -> bool:
        """Whether words are phones, which people read as kana."""
        return self.measures is MEASURES["phones"]

    def rates(self, seed: int, samples: int) -> dict[str, Any]:
        """Every measure of the whole set: rate, interval, counts and normaliser."""
        result = {}
        for measure in self.measures:
            counts = self.counts[measure.name]
            low, high = bootstrap_interval(
                [c.errors for c in counts], [c.length for c in counts], seed=seed, n=samples
            )
            interval = {"low": low, "high": high, "normaliser": measure.normaliser}
            result[measure.name] = _counted(counts) | interval
        return result

    def by(self, key: Callable[[Scored], str]) -> dict[str, Any]:
        """Every measure of each group of utterances, such as those of one talk."""
        groups: dict[str, list[int]] = {}
        for number, item in enumerate(self.utterances):
            groups.setdefault(key(item), []).append(number)
        return {
            name: {"utterances": len(members)}
            | {m: _counted([counts[i] for i in members]) for m, counts in self.counts.items()}
            for name, members in sorted(groups.items())
        }

    def confusions(self, most: int) -> dict[str, list[tuple[str, str, int]]]:
        """(said, heard, how often) of the most frequent errors of words and symbols; "" is nothing."""
        found: dict[str, Counter[tuple[str, str]]] = {}
        for measure in self.measures:
            counter = found.setdefault(measure.name, Counter())
            for item in self.utterances:
                pairs = align(measure.view(item.said), measure.view(item.heard))
                counter.update((_name(a), _name(b)) for a, b in pairs if a != b)
        return {
            name: [
                (said, heard, n) for (said, heard), n in sorted(c.items(), key=lambda x: (-x[1], x[0]))[:most]
            ]
            for name, c in found.items()
        }


def _counted(counts: Sequence[Errors]) -> dict[str, Any]:
    total = sum(counts, Errors(0, 0, 0, 0))
    return {
        "rate": total.rate,
        "errors": total.errors,
        "length": total.length,
        "substitutions": total.substitutions,
        "insertions": total.insertions,
        "deletions": total.deletions,
    }


def _name(item: Any) -> str:
    """A word or symbol to read."""
    return "" if item is None else item if isinstance(item, str) else " ".join(item)


# --- text to read -----------------------------------------------------------------------------------------


def published_table(
    published: Mapping[str, Mapping[str, float]], ours: Sequence[tuple[str, Mapping[str, float]]]
) -> str:
    """WER % of systems here, (name, by set), a column a set, under published rows; "" if either has none."""
    here = [(f"here: {name}", row) for name, row in ours if row]
    if not published or not here:
        return ""
    rows = [(f"published: {name}", row) for name, row in published.items()] + here
    sets, width = sorted({split for row in published.values() for split in row}), max(len(n) for n, _ in rows)
    lines = [
        "WER % beside the published table",
        f"  {'':<{width}}" + "".join(f"{split:>9}" for split in sets),
    ]
    for name, row in rows:
        cells = (f"{row[split]:>9.2f}" if split in row else f"{'-':>9}" for split in sets)
        lines.append(f"  {name:<{width}}" + "".join(cells))
    return "\n".join(lines) + "\n"


def phone_wer(scores: Mapping[str, Any]) -> dict[str, float]:
    """WER % of each set whose words are phones: the only one that compares with a published one."""
    return {split: 100 * score["wer"]["rate"] for split, score in scores.items() if "per" in score}


def rates_table(scores: Mapping[str, Any]) -> str:
    """Every measure of every set with its interval and its normaliser, and the test against a baseline."""
    lines = []
    for split, score in scores.items():
        lines.append(f"{split}: {score['utterances']} utterances")
        for title, one in measures_of(score):
            interval = f"[{100 * one['low']:.2f}, {100 * one['high']:.2f}]"
            lines.append(f"  {title:<9}{100 * one['rate']:>7.2f} % {interval:<17} {one['normaliser']}")
        for title, test in measures_of(score.get("against", {})):
            gap = f"{100 * test['difference']:+.2f} [{100 * test['low']:+.2f}, {100 * test['high']:+.2f}]"
            lines.append(
                f"  {title} less the baseline's {100 * test['baseline']:.2f} %: {gap}, p = {test['p']:.3f}"
            )
    return "\n".join(lines) + "\n"


def details(split: str, score: Mapping[str, Any], found: SetScore) -> Iterator[str]:
    """Lines of one set for a person: talks, speakers, confusions, and every utterance aligned."""
    yield from rates_table({split: score}).splitlines()
    for title, groups in (("talk", score["talks"]), ("speaker", score["speakers"])):
        if 1 < len(groups) < len(found.utterances):
            yield ""
            yield f"By {title}"
            for name, group in groups.items():
                rates = "  ".join(f"{t} {100 * one['rate']:.2f} %" for t, one in measures_of(group))
                yield f"  {_wide(name, 24)}{group['utterances']:>6} utterances  {rates}"
    for measure in found.measures:
        kana = found.in_kana and measure.name == "wer"
        if rows := score["confusions"][measure.name]:
            yield ""
            yield f"Most frequent errors, {measure.title} (said, heard, how often)"
            for said, heard, n in rows:
                yield f"  {_wide(_shown(said, kana), 24)}{_wide(_shown(heard, kana), 24)}{n:>6}"
    yield ""
    yield "Utterances (S: another one, D: not heard, I: not said)"
    for number, item in enumerate(found.utterances):
        counts = found.counts[found.measures[0].name][number]
        yield ""
        yield f"{item.id}  {found.measures[0].title} {counts.errors}/{counts.length}"
        yield from aligned_lines(item.said, item.heard, found.in_kana)


def aligned_lines(said: Words, heard: Words, kana: bool) -> Iterator[str]:
    """What was said, what was heard, and a mark under each difference; columns line up."""
    rows: tuple[list[str], list[str], list[str]] = ([], [], [])
    for a, b in align(said, heard):
        mark = "" if a == b else "I" if a is None else "D" if b is None else "S"
        texts = (_shown(_name(a), kana), _shown(_name(b), kana), mark)
        width = max(_width(text) for text in texts) + 2
        for row, text in zip(rows, texts, strict=True):
            row.append(_wide(text, width))
    for title, row in zip(("said", "heard", ""), rows, strict=True):
        if title or any(mark.strip() for mark in row):
            yield f"  {title:<7}{''.join(row)}".rstrip()


def measures_of(score: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(title, value) of what a score says of each measure."""
    named = {measure.name: measure.title for group in MEASURES.values() for measure in group}
    return [(named[name], one) for name, one in score.items() if name in named]


def _shown(symbols: str, kana: bool) -> str:
    """A word to read, or `***` for nothing."""
    parts = symbols.split(" ")
    return "***" if not symbols else phones_to_kana(parts) if kana else "".join(parts)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _wide(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
