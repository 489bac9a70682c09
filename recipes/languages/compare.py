"""Comparison of networks pretrained on Japanese, pretrained on other languages, and not pretrained.

    python recipes/languages/compare.py data=/path/to/common_voice_ja other_languages=/path/to/others
    python recipes/languages/compare.py --disjoint data=... other_languages=...

The script pretrains in exp/languages-japanese, exp/languages-other and exp/languages-few, fine-tunes and
scores the systems of the recipe in exp/languages, and prints a table of their error rates. With --disjoint,
pretraining and fine-tuning use recordings of different speakers, and the experiments are
exp/languages-disjoint-japanese, exp/languages-disjoint-few and exp/languages-disjoint. Finished stages are
kept and interrupted stages are resumed, so the command can be repeated until it succeeds. The script accepts
all settings of the stages.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert import run
from jahubert.errors import UserError
from jahubert.train.experiment.provenance import DONE, read_record, verify_files
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import PER_ITERATION


@dataclass(frozen=True)
class Comparison:
    """Experiments of a comparison: pretraining experiments by name, and the fine-tuning of all systems."""

    name: str  # name of the experiment with all systems
    pretraining: dict[str, list[str]]  # settings of each pretraining experiment, by name
    finetuning: list[str]  # settings of the experiment with all systems
    without: tuple[str, ...] = ()  # systems of the recipe that are not compared


# The number of speakers of `few` gives nearly the effective number of speakers (exponential of the entropy of
# their durations) of the Japanese training split.
SAME_SPEAKERS = Comparison(
    name="languages",
    pretraining={
        "japanese": ["language=japanese"],
        "other": ["language=other"],
        "few": ["language=other", "speakers=34"],
    },
    finetuning=[],
)
DISJOINT = Comparison(
    name="languages-disjoint",
    pretraining={
        "japanese": ["language=japanese", "group=pretraining", "minutes=60"],
        "few": ["language=other", "speakers=17", "minutes=60"],
    },
    finetuning=["group=finetuning", "minutes=30"],
    without=("other", "scratch"),
)
SPLIT = "test_cv"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--disjoint",
        action="store_true",
        help="pretrain and fine-tune on recordings of different speakers",
    )
    parser.add_argument("settings", nargs="*", help="data=..., other_languages=... and any other setting")
    args = parser.parse_args(argv)
    comparison = DISJOINT if args.disjoint else SAME_SPEAKERS
    overrides = ["recipe=languages", f"name={comparison.name}", *args.settings]
    try:
        tree = compose(overrides)
        systems = [name for name in tree["systems"] if name.split("-")[0] not in comparison.without]
        for job in [*pretraining_jobs(tree, comparison), *finetuning_jobs(systems, comparison)]:
            if status := run.main([*overrides, *job]):
                return status
        print(table(Path(tree["exp"]), systems))
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def pretraining_jobs(tree: dict[str, Any], comparison: Comparison) -> list[list[str]]:
    """Return the overrides of every pretraining stage, in order."""
    jobs = []
    for name, settings in comparison.pretraining.items():
        experiment = [f"exp={tree['exp']}-{name}", *settings]
        jobs.append([*experiment, "stage=prepare"])
        for iteration in range(1, tree["iterations"] + 1):
            jobs += [[*experiment, f"stage={stage}", f"iteration={iteration}"] for stage in PER_ITERATION]
    return jobs


def finetuning_jobs(systems: list[str], comparison: Comparison) -> list[list[str]]:
    """Return the overrides that fine-tune, decode and score each system."""
    settings = [*comparison.finetuning, "iterations=0", "stage=all"]
    return [[*settings, f"system={system}"] for system in systems]


def table(exp: Path, systems: list[str]) -> str:
    """Format the error rates of all systems in Markdown.

    The PER of each system that was not pretrained on Japanese is compared with that of a system that was
    pretrained on Japanese and fine-tuned on the same labels.
    """
    lines = [
        "| system | labels, min | updates | PER, % | difference from `japanese` | p | kana CER, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in systems:
        folder = exp / "systems" / system
        verify_files(folder / "score")
        score = json.loads((folder / "score" / "scores.json").read_text(encoding="utf-8"))[SPLIT]
        record = read_record(folder / "finetune" / DONE)
        against = score.get("against", {}).get("per")
        row = [
            f"`{system}`",
            f"{60 * record['metrics']['hours']:.0f}",
            f"{record['settings']['train.max_steps']:,}",
            interval(score["per"], "rate"),
            interval(against, "difference", "+") if against else "",
            f"{against['p']:.3f}" if against else "",
            interval(score["kana_cer"], "rate"),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def interval(value: dict[str, float], name: str, sign: str = "") -> str:
    """Format a value with its 95 % interval, in percent."""
    return f"{100 * value[name]:{sign}.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
