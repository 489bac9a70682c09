"""PER of test utterances together, and of Common Voice speakers by gender and by age.

    folder=exp/builtin/systems/main/decode-ngram
    python recipes/builtin/by_group.py $folder/test_cv.jsonl --common-voice /path/to/common_voice_ja
    python recipes/builtin/by_group.py $folder/test_low.jsonl $folder/test_high.jsonl   # all held-out words

The gender and the age of a speaker are those in the first row of the corpus that states them. The 95 %
intervals are bootstrapped over utterances, so they do not reflect the variation between speakers. If all
speakers are known, a second row for all utterances has an interval that is bootstrapped over speakers.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from read_speech import SENTENCES, read_rows

from jahubert.errors import UserError
from jahubert.train.data.utterances import is_file
from jahubert.train.evaluation.metrics import ErrorCounts, bootstrap_interval
from jahubert.train.evaluation.scoring import MEASURES, ScoredUtterance, SetScore, read_hypotheses

UNKNOWN = "not stated"
_NONE = ErrorCounts(0, 0, 0, 0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "hypotheses",
        nargs="+",
        type=Path,
        help="files of the decode stage (<split>.jsonl), which are scored together",
    )
    parser.add_argument(
        "--common-voice", type=Path, metavar="DIR", help="corpus that states the gender and age of speakers"
    )
    args = parser.parse_args(argv)
    try:
        utterances = [item for path in args.hypotheses for item in read_hypotheses(path)]
        print(table(group_scores(utterances, args.common_voice), 2))
    except UserError as error:
        print(f"by_group.py: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def group_scores(utterances: list[ScoredUtterance], common_voice: Path | None) -> dict[str, dict[str, Any]]:
    """Compute the PER of all utterances and of each group of speakers, by the name of the group.

    Args:
        utterances: scored utterances. Their vocabulary must be phones.
        common_voice: folder of the corpus with the gender and age of the speakers; None: no groups.

    Raises:
        DataError: the corpus has no readable table.
    """
    scores = {"all": _score(utterances)}
    if all(utterance.speaker for utterance in utterances):
        scores["all, interval over speakers"] = _score(utterances, over_speakers=True)
    for column in ("gender", "age") if common_voice is not None else ():
        value_of = first_values(common_voice, column)
        groups: dict[str, list[ScoredUtterance]] = defaultdict(list)
        for utterance in utterances:
            groups[value_of.get(utterance.speaker, UNKNOWN)].append(utterance)
        for value, members in sorted(groups.items()):
            scores[f"{column}: {value}"] = _score(members)
    return scores


def first_values(common_voice: Path, column: str) -> dict[str, str]:
    """Map each speaker to the first value in a column that is not empty."""
    release = common_voice / "validated.tsv"  # in a Common Voice release, it contains all rows of the splits
    table, speaker = (release, "client_id") if is_file(release) else (common_voice / SENTENCES, "speaker")
    values: dict[str, str] = {}
    for row in read_rows(table, (speaker,)):
        if row.get(column):
            values.setdefault(row[speaker], row[column])
    return values


def _score(utterances: list[ScoredUtterance], over_speakers: bool = False) -> dict[str, Any]:
    """Compute the PER, with a bootstrap interval over utterances or over speakers."""
    counts = SetScore(utterances, MEASURES["phones"]).counts["per"]
    units: dict[str, ErrorCounts] = defaultdict(lambda: _NONE)
    for number, (utterance, count) in enumerate(zip(utterances, counts, strict=True)):
        units[utterance.speaker if over_speakers else str(number)] += count
    low, high = bootstrap_interval(
        *zip(*((unit.errors, unit.length) for unit in units.values()), strict=True)
    )
    speakers = len({utterance.speaker for utterance in utterances if utterance.speaker})
    rates = {"rate": sum(counts, _NONE).rate, "low": low, "high": high}
    return {"speakers": speakers, "utterances": len(utterances)} | rates


def table(scores: dict[str, dict[str, Any]], digits: int) -> str:
    """Format the scores of groups as a Markdown table, in percent."""
    lines = ["| group | speakers | utterances | PER (%) |", "|---|---|---|---|"]
    for name, score in scores.items():
        rate, low, high = (f"{100 * score[key]:.{digits}f}" for key in ("rate", "low", "high"))
        speakers = score["speakers"] or UNKNOWN
        lines.append(f"| {name} | {speakers} | {score['utterances']} | {rate} [{low}, {high}] |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
