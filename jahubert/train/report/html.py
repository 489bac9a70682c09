"""A run as one HTML page that needs no other file: results, curves, units, the worst utterances, settings."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.train.evaluation.scoring import phone_wer
from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.report import figures
from jahubert.train.report.examples import Example
from jahubert.train.report.html_text import TEXT
from jahubert.train.report.units import UnitCounts

_LINES = (("training", "training_line"), ("validation", "validation_line"))  # of curves, with their colours
STYLE = Path(__file__).with_name("html.css")


@dataclass(frozen=True)
class PageData:
    """What the page is made from; units and their phones by the name of their iteration."""

    exp: Path
    summary: dict[str, Any]
    counts: UnitCounts
    examples: Mapping[str, Sequence[Example]]  # by system


def render_page(run: PageData, language: str) -> str:
    """The page, in English ("en") or Japanese ("ja")."""
    say = TEXT[language]
    records = {
        str(path.parent.relative_to(run.exp)): read_record(path)
        for path in sorted(run.exp.glob(f"**/{DONE}"))
    }
    sections = [
        ("results", _results(run.summary, say)),
        ("training", _training(run.exp, say)),
        ("units", _units(run, say)),
        ("worst", _worst(run.examples, say)),
        ("settings", _settings(records, say)),
    ]
    shown = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{name}">{say[name]}</a>' for name, _ in shown)
    bodies = "".join(f'<section id="{name}"><h2>{say[name]}</h2>{body}</section>' for name, body in shown)
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or the browser would ask a server for one
        f"<title>{_escape(run.exp.name)}</title><style>{STYLE.read_text()}</style></head><body>"
        f"<h1>{_escape(run.exp.name)}</h1>{_head(run, records, say)}<nav>{links}</nav>{bodies}"
        "</body></html>\n"
    )


def _head(run: PageData, records: Mapping[str, Any], say: Mapping[str, str]) -> str:
    last = max(records.values(), key=lambda record: record["finished"])
    versions = ", ".join(f"{name} {version}" for name, version in last["made_with"].items())
    cards = []
    for measure in ("wer", "per"):
        found = [
            (score[measure]["rate"], name, split)
            for name, system in run.summary["systems"].items()
            for split, score in system["scores"].items()
            if measure in score  # kana and characters have no phones
        ]
        if found:
            rate, name, split = min(found)
            cards.append((f"{100 * rate:.1f} %", f"{say[measure]}: {name}, {split}"))
    known = [(unit["pnmi"], name) for name, unit in run.summary["units"].items() if "pnmi" in unit]
    if known:
        pnmi, name = max(known)
        cards.append((f"{pnmi:.3f}", f"PNMI: {_title(name, run.summary['units'], say)}"))
    hours = run.summary["corpus"].get("hours")
    if isinstance(hours, (int, float)):
        cards.append((f"{hours:.1f} h", say["corpus"]))
    cards.append((_duration(sum(record["seconds"] for record in records.values())), say["computing"]))
    shown = "".join(f'<div class="card"><b>{_escape(b)}</b><span>{_escape(s)}</span></div>' for b, s in cards)
    return f'<p class="note">{last["finished"]} · {_escape(versions)}</p><div class="cards">{shown}</div>'


def _results(summary: Mapping[str, Any], say: Mapping[str, str]) -> str:
    systems, published = summary["systems"], summary["published"]
    splits = dict.fromkeys(split for system in systems.values() for split in system["scores"])
    parts = []
    for split in splits:
        rows: list[tuple[str, list[str]]] = []
        of_phones = any(split in phone_wer(system["scores"]) for system in systems.values())
        for name, row in published.items():
            if split in row and of_phones:  # others are words of other symbols
                cells = [_escape(f"{say['published']}: {name}"), "", "", f"{row[split]:.2f}", "", ""]
                rows.append(("published", cells))
        for name, system in systems.items():
            if split in system["scores"]:
                score = system["scores"][split]
                labels = _duration(3600 * system["hours"])
                found = [score.get("wer"), score.get("per"), score.get("kana_cer", score.get("cer"))]
                cells = ["-" if rate is None else _rate(rate) for rate in found]
                rows.append(("", [_escape(name), labels, f"{system['updates']:,}", *cells]))
        n = next(
            system["scores"][split]["utterances"] for system in systems.values() if split in system["scores"]
        )
        header = [say["system"], say["labels"], say["updates"], "WER %", "PER %", say["kana_cer"]]
        parts.append(f"<h3>{_escape(split)} ({n:,} {say['utterances']})</h3>{_table(header, rows)}")
    return "".join(parts) + f'<p class="note">{say["results_note"]}</p>' if parts else ""


def _training(exp: Path, say: Mapping[str, str]) -> str:
    parts = []
    for path in sorted(exp.glob("**/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        shown = [
            _figure(address, say.get(f"metric_{name}", name))
            for name, address in figures.curves(rows).items()
        ]
        if shown:
            name = _escape(str(path.parent.relative_to(exp)))
            parts.append(f'<h3>{name}</h3><div class="figures">{"".join(shown)}</div>')
    lines = [f'<span class="{kind}">━ {say[name]}</span>' for kind, name in _LINES]
    legend = f'<p class="note">{" ".join(lines)} · {say["training_note"]}</p>'
    return legend + "".join(parts) if parts else ""


def _units(run: PageData, say: Mapping[str, str]) -> str:
    units, parts = run.summary["units"], []
    if units:
        measures = ("pnmi", "phone_purity", "cluster_purity")
        header = [say["units"], "K", say["used"], "PNMI", say["phone_purity"], say["cluster_purity"]]
        rows = []
        for name, unit in units.items():
            numbers = [f"{unit[key]:.3f}" if key in unit else "" for key in measures]
            title = _escape(_title(name, units, say))
            rows.append(("", [title, str(unit["n_units"]), str(unit.get("used", "")), *numbers]))
        parts.append(_table(header, rows))
        sources = {unit["phones"] for unit in units.values() if "phones" in unit}
        parts += [f'<p class="note">{say["phone_times"]}: {_escape(source)}</p>' for source in sources]
    drawn = [
        _figure(figures.unit_usage(usage_K), f"{_title(name, units, say)}: {say['usage']}")
        for name, usage_K in run.counts.usage.items()
    ]
    if run.summary.get("layers"):
        drawn.append(_figure(figures.layer_curves(run.summary["layers"]), say["layers"]))
    parts.append(f'<div class="figures">{"".join(drawn)}</div>' if drawn else "")
    for name, count_PK in run.counts.joint.items():
        matrix = figures.phone_matrix(count_PK, run.counts.phones)
        caption = f"{_title(name, units, say)}: {say['matrix']}"
        parts.append(f'<div class="scroll wide">{_figure(matrix, caption)}</div>')
    return "".join(parts)


def _worst(examples: Mapping[str, Sequence[Example]], say: Mapping[str, str]) -> str:
    parts = []
    for system, found in examples.items():
        parts += [f"<h3>{_escape(system)}</h3>", *(_example(example, say) for example in found)]
    colours = " ".join(
        f'<span class="{kind}">&nbsp;{say[kind]}&nbsp;</span>' for kind in ("sub", "del", "ins")
    )
    return f'<p class="note">{say["worst_note"]} {colours}</p>{"".join(parts)}' if parts else ""


def _example(example: Example, say: Mapping[str, str]) -> str:
    reference, hypothesis = [], []
    for a, b in example.pairs:
        kind = "" if a == b else "ins" if a is None else "del" if b is None else "sub"
        reference.append(f'<td class="{kind}">{_escape(str(a or "·"))}</td>')
        hypothesis.append(f'<td class="{kind}">{_escape(str(b or "·"))}</td>')
    sound = f'<audio controls preload="metadata" src="{example.audio}"></audio>' if example.audio else ""
    picture = (
        f'<div class="scroll">{_image(example.figure, say["picture"] + ": " + example.id)}</div>'
        if example.figure
        else f'<p class="note">{_escape(example.note)}</p>'
    )
    errors = example.errors
    return (
        f'<div class="example"><p><b>{_escape(example.text or example.id)}</b></p>'
        f'<p class="note">{_escape(example.id)} · {_escape(example.split)} · {example.seconds:.1f} s · '
        f"PER {100 * errors.rate:.0f} % ({errors.errors}/{errors.length})</p>{sound}{picture}"
        f'<div class="scroll"><table class="phones"><tr><th>{say["reference"]}</th>{"".join(reference)}</tr>'
        f"<tr><th>{say['hypothesis']}</th>{''.join(hypothesis)}</tr></table></div></div>"
    )


def _settings(records: Mapping[str, Any], say: Mapping[str, str]) -> str:
    parts = []
    for folder, record in sorted(records.items(), key=lambda item: item[1]["finished"]):
        about = {
            "fingerprint": record["fingerprint"],
            say["finished"]: record["finished"],
            **record["made_with"],
        }
        rows = [
            ("", [_escape(key), _escape(_value(value))])
            for key, value in {**record["settings"], **about}.items()
        ]
        summary = f"{_escape(folder)} <small>{_duration(record['seconds'])}</small>"
        parts.append(f"<details><summary>{summary}</summary>{_table([], rows, 'settings')}</details>")
    return "".join(parts)


def _title(name: str, units: Mapping[str, Any], say: Mapping[str, str]) -> str:
    """What the units of an iteration are: of which layer, or of MFCCs."""
    if name not in units:
        return name
    unit = units[name]
    feature = str(unit["feature"]).upper() if unit["layer"] is None else f"{say['layer']} {unit['layer']}"
    return f"{name if unit['learnt'] else say['last_model']}: {feature}"


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = "".join(
        f'<tr class="{mark}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for mark, row in rows
    )
    thead = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table class="{kind}">{thead}<tbody>{lines}</tbody></table></div>'


def _figure(address: str, caption: str) -> str:
    return f"<figure><figcaption>{_escape(caption)}</figcaption>{_image(address, caption)}</figure>"


def _image(address: str, alt: str) -> str:
    return f'<img alt="{_escape(alt)}" src="{address}">'


def _rate(score: Mapping[str, float]) -> str:
    return f"{100 * score['rate']:.2f} <small>[{100 * score['low']:.2f}, {100 * score['high']:.2f}]</small>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text  # the fingerprint of an input


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
