"""Text tables of the report, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jahubert.train.evaluation.scoring import measure_titles, phone_wer, published_table


def text_tables(summary: Mapping[str, Any]) -> str:
    """Format all tables: published results, results by split, and units."""
    systems = summary["systems"]
    results = [(system["label"], phone_wer(system["scores"])) for system in systems.values()]
    parts = [published_table(summary["published"], results)]
    parts += [_split_table(split, systems) for split in splits_of(systems)]
    parts += [_normalizers(systems), _units_table(summary["units"])]
    return "\n\n".join(part.rstrip() for part in parts if part)


def splits_of(systems: Mapping[str, Any]) -> list[str]:
    """Return the splits for which at least one system has scores."""
    return sorted({split for system in systems.values() for split in system["scores"]})


def _split_table(split: str, systems: Mapping[str, Any]) -> str:
    width = max(18, *(len(name) + 2 for name in systems))
    scored = {name: system for name, system in systems.items() if split in system["scores"]}
    measures = measure_titles(*(system["scores"][split] for system in scored.values()))
    header = "".join(f"{title + ' %':<25}" for title in measures.values())
    lines = [
        f"Recognition on {split} (95 % intervals in brackets)",
        f"  {'system':<{width}}{'labels':>9}{'updates':>9}   {header}",
    ]
    for name, system in scored.items():
        hours = system["hours"]
        labels = f"{hours * 60:.1f} min" if hours < 10 else f"{hours:.0f} h"
        rates = "".join(f"{_rate(system['scores'][split].get(measure)):<25}" for measure in measures)
        lines.append(f"  {name:<{width}}{labels:>9}{system['updates']:>9}   {rates}")
    return "\n".join(line.rstrip() for line in lines)


def _normalizers(systems: Mapping[str, Any]) -> str:
    lines = {  # measures with the same title are normalized differently for phones and kana
        f"{title}: {score[name]['normalizer']}": None
        for system in systems.values()
        for score in system["scores"].values()
        for name, title in measure_titles(score).items()
    }
    return "\n".join(lines)


def _units_table(units: Mapping[str, Any]) -> str:
    measured = {name: unit for name, unit in units.items() if "pnmi" in unit}
    if not measured:
        return ""
    source = next(iter(measured.values()))["phones"]
    lines = [
        f"Units compared with the phone of each frame (phone times: {source}); PNMI increases with K",
        f"  {'units':<24}{'K':>5}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}",
    ]
    for name, unit in measured.items():
        model = name if unit["pretrained_on"] else "last model"
        feature = unit["feature"] if unit["layer"] is None else f"layer {unit['layer']}"
        lines.append(
            f"  {model + ': ' + feature:<24}{unit['n_units']:>5}{unit['pnmi']:>8.3f}"
            f"{unit['phone_purity']:>14.3f}{unit['cluster_purity']:>16.3f}"
        )
    return "\n".join(lines)


def _rate(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score['rate']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
