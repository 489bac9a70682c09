"""PER of Common Voice speakers by gender and by age, as far as the corpus states them.

    python recipes/builtin/by_group.py exp/builtin/systems/main/decode/test_cv.jsonl /path/to/transcripts.tsv

The gender and the age of a speaker are those in the first row of the table that states them. The 95 %
intervals are bootstrapped over utterances, so they do not reflect the variation between speakers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from read_speech import read_rows

from jahubert.train.evaluation.metrics import bootstrap_interval
from jahubert.train.evaluation.scoring import MEASURES, ScoredUtterance, SetScore, read_hypotheses

UNKNOWN = "not stated"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hypotheses", type=Path, help="a file of the decode stage: <split>.jsonl")
    parser.add_argument("table", type=Path, help="transcripts.tsv with the columns speaker, gender and age")
    args = parser.parse_args()
    utterances = list(read_hypotheses(args.hypotheses))
    print("| group | speakers | utterances | PER, % |\n|---|---|---|---|")
    for column in ("gender", "age"):
        value_of = first_values(args.table, column)
        groups: dict[str, list[ScoredUtterance]] = defaultdict(list)
        for utterance in utterances:
            groups[value_of.get(utterance.speaker, UNKNOWN)].append(utterance)
        for value, members in sorted(groups.items()):
            speakers = len({utterance.speaker for utterance in members})
            print(f"| {column}: {value} | {speakers} | {len(members)} | {per(members)} |")


def first_values(table: Path, column: str) -> dict[str, str]:
    """Map each speaker to the first value in a column that is not empty."""
    values: dict[str, str] = {}
    for row in read_rows(table, ("speaker",)):
        if row[column]:
            values.setdefault(row["speaker"], row[column])
    return values


def per(utterances: list[ScoredUtterance]) -> str:
    """Format the PER with its interval, in percent."""
    counts = SetScore(utterances, MEASURES["phones"]).counts["per"]
    errors, lengths = [count.errors for count in counts], [count.length for count in counts]
    low, high = bootstrap_interval(errors, lengths)
    return f"{100 * sum(errors) / max(1, sum(lengths)):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
