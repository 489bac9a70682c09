"""Comparison of networks pretrained on Japanese, pretrained on other languages, and not pretrained.

    python recipes/languages/compare.py data=/path/to/common_voice_ja other_languages=/path/to/others

The script pretrains in exp/languages-japanese, exp/languages-other and exp/languages-few, fine-tunes and
scores the systems of the recipe in exp/languages, and prints a table of their error rates. Finished stages
are kept and interrupted stages are resumed, so the command can be repeated until it succeeds. The script
accepts all settings of the stages.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jahubert import run
from jahubert.errors import UserError
from jahubert.train.experiment.provenance import DONE, read_record, verify_files
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import PER_ITERATION

# Settings of each pretraining experiment. With 34 speakers of other languages, the effective number of
# speakers (exponential of the entropy of their durations) is that of the Japanese training split.
PRETRAINING = {
    "japanese": ["language=japanese"],
    "other": ["language=other"],
    "few": ["language=other", "speakers=34"],
}
SPLIT = "test_cv"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="data=..., other_languages=... and any other setting")
    overrides = ["recipe=languages", *parser.parse_args(argv).settings]
    try:
        tree = compose(overrides)
        for job in [*pretraining_jobs(tree), ["iterations=0", "stage=all"]]:
            if status := run.main([*overrides, *job]):
                return status
        print(table(Path(tree["exp"]), list(tree["systems"])))
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def pretraining_jobs(tree: dict[str, Any]) -> list[list[str]]:
    """Return the overrides of every pretraining stage, in order."""
    jobs = []
    for name, settings in PRETRAINING.items():
        experiment = [f"exp={tree['exp']}-{name}", *settings]
        jobs.append([*experiment, "stage=prepare"])
        for iteration in range(1, tree["iterations"] + 1):
            jobs += [[*experiment, f"stage={stage}", f"iteration={iteration}"] for stage in PER_ITERATION]
    return jobs


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
