"""What a run came to: one table on the terminal, one HTML page.

Reads   everything under the experiment's folder that is done
Writes  summary.json, table.txt, report.html

    python -m jahubert.run recipe=demo stage=report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jahubert.train import ranks, report
from jahubert.train.provenance import write_json, written_beside

VERSION = 1
KEEP = False  # it reads whatever is there, so it is made anew every time


@dataclass(frozen=True)
class Config:
    exp: Path
    published: dict[str, Any] = field(default_factory=dict)  # name -> {split: WER %}, shown beside ours


def run(config: Config, out: Path) -> dict[str, Any]:
    if ranks.rank():
        return {}
    counted = report.phone_counts(config.exp)
    summary = report.summarize(config.exp, counted) | {"published": config.published}
    table = report.table(summary)
    write_json(out / "summary.json", summary)
    with written_beside(out / "table.txt") as file:
        file.write(table + "\n")
    with written_beside(out / "report.html") as file:
        file.write(report.page(config.exp, summary, table, counted))
    print(f"{table}\n\nReport: {out / 'report.html'}")
    return {}
