"""Renderer for the report as a single HTML page for desktop and mobile, in light and dark mode."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.train.evaluation.scoring import display_text, measure_titles, phone_wer
from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.report import figures
from jahubert.train.report.examples import Example
from jahubert.train.report.markup import (
    Row,
    Strings,
    definitions,
    details,
    escape,
    figure,
    image,
    note,
    table,
)
from jahubert.train.report.tables import splits_of
from jahubert.train.report.units import LAYER_UNITS, LayerQuality, UnitCounts
from jahubert.train.trainer.metric_log import read_metrics

STYLE = Path(__file__).with_name("html.css")
_MAX_SPEAKERS = 30
_MAX_CONFUSIONS = 15


@dataclass(frozen=True)
class PageData:
    """Content of the report page."""

    experiments: Mapping[str, Path]  # name -> folder; the report is about the first experiment
    summary: Mapping[str, Any]
    counts: UnitCounts
    layers: LayerQuality | None
    examples: Mapping[str, Mapping[str, Sequence[Example]]]  # system -> "worst", "median", "best"

    @property
    def name(self) -> str:
        return next(iter(self.experiments))

    @property
    def exp(self) -> Path:
        return self.experiments[self.name]


def render_page(data: PageData, language: str) -> str:
    """Render the page as HTML, in English ("en") or Japanese ("ja")."""
    strings = Strings(language)
    records = stage_records(data.exp)
    bodies = {
        "results": _results(data, strings),
        "units": _units(data, strings),
        "examples": _examples(data.examples, strings),
        "training": _training(data.experiments, strings),
        "comparison": _comparison(data.experiments, strings),
        "settings": _settings(records, strings),
    }
    bodies = {name: body for name, body in bodies.items() if body}
    links = "".join(f'<a href="#{name}">{strings(name)}</a>' for name in bodies)
    sections = "".join(
        f'<section id="{name}"><h2>{strings(name)}</h2>{body}</section>' for name, body in bodies.items()
    )
    title = escape(data.name)
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # prevents browsers from requesting an icon from a server
        f"<title>{title}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>{title}</h1>{_header(data, records, strings)}<nav>{links}</nav>{sections}"
        "</body></html>\n"
    )


def stage_records(exp: Path) -> dict[str, Any]:
    """Read the records of the finished stages of an experiment, keyed by folder."""
    return {str(path.parent.relative_to(exp)): read_record(path) for path in sorted(exp.glob(f"**/{DONE}"))}


# --- header -----------------------------------------------------------------------------------------------


def _header(data: PageData, records: Mapping[str, Any], strings: Strings) -> str:
    cards = _headline(data, strings)
    hours = data.summary["corpus"].get("hours")
    if isinstance(hours, (int, float)):
        cards.append((strings.duration(3600 * hours), strings("corpus")))
    seconds = sum(record["seconds"] for record in records.values())
    cards.append((strings.duration(seconds), strings("computing")))
    boxes = "".join(f'<div class="card"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in cards)
    return f'<div class="cards">{boxes}</div>{_made_with(records, strings)}'


def _headline(data: PageData, strings: Strings) -> list[tuple[str, str]]:
    """Select the most important numbers and their captions."""
    cards = []
    for measure, title in (("wer", "lowest_wer"), ("per", "lowest_per"), ("cer", "lowest_cer")):
        rates = [
            (score[measure]["rate"], name, split)
            for name, system in data.summary["systems"].items()
            for split, score in system["scores"].items()
            if measure in score
        ]
        if rates:
            rate, name, split = min(rates)
            cards.append((f"{100 * rate:.1f} %", f"{strings(title)}: {name}, {split}"))
    if data.layers:
        best = _best_layer(data.layers, strings)
        text = strings(
            "pnmi_equal_k", k=best.n_units, layer=best.name, mfcc=f"{data.layers.mfcc['pnmi']:.3f}"
        )
        cards.append((f"{best.pnmi:.3f}", text))
    return cards


def _made_with(records: Mapping[str, Any], strings: Strings) -> str:
    """Render the commands, commits, devices and versions of all stages, and the end time of the last one."""
    values: dict[str, dict[str, None]] = {}
    ordered = sorted(records.values(), key=lambda record: record["finished"])
    for record in ordered:
        made_with = record["made_with"]
        versions = (f"{key} {made_with[key]}" for key in ("jahubert", "torch", "python") if key in made_with)
        named = {key: made_with.get(key, "") for key in ("command", "commit", "device")}
        for key, value in (named | {"versions": ", ".join(versions)}).items():
            if value:
                values.setdefault(key, {})[value] = None
    items = {}
    for key in ("command", "commit", "device", "versions"):
        if key in values:
            tag = "code" if key in ("command", "commit") else "span"
            lines = "<br>".join(f"<{tag}>{escape(value)}</{tag}>" for value in values[key])
            items[strings(key)] = f'<div class="long">{lines}</div>' if key == "command" else lines
    items[strings("finished")] = ordered[-1]["finished"]
    return definitions(items)


# --- results ----------------------------------------------------------------------------------------------


def _results(data: PageData, strings: Strings) -> str:
    systems, published = data.summary["systems"], data.summary["published"]
    parts = []
    for split in splits_of(systems):
        scored = {name: system for name, system in systems.items() if split in system["scores"]}
        scores = [system["scores"][split] for system in scored.values()]
        measures = _measure_titles(strings, *scores)
        rows: list[Row] = []
        if any(split in phone_wer(system["scores"]) for system in scored.values()):
            for name, wer in published.items():
                if split in wer:
                    title = escape(f"{strings('published')}: {name}")
                    rates = [f"{wer[split]:.2f}" if measure == "wer" else "" for measure in measures]
                    rows.append(("published", [title, "", "", *rates]))
        for name, system in scored.items():
            score = system["scores"][split]
            rates = [_rate(score[measure]) if measure in score else "" for measure in measures]
            cells = [escape(name), strings.duration(3600 * system["hours"]), f"{system['updates']:,}"]
            rows.append(("", [*cells, *rates]))
        header = [strings("system"), strings("labels"), strings("updates"), *_percent(measures)]
        count = strings("n_utterances", f"{scores[0]['utterances']:,}")
        parts.append(f"<h3>{escape(split)} <small>({count})</small></h3>{table(header, rows)}")
        parts += [_breakdown(name, system["scores"][split], strings) for name, system in scored.items()]
    if not parts:
        return ""
    has_words = any("wer" in score for system in systems.values() for score in system["scores"].values())
    return "".join(parts) + note(strings("results_note")) + (note(strings("wer_note")) if has_words else "")


def _measure_titles(strings: Strings, *scores: Mapping[str, Any]) -> dict[str, str]:
    """Return the localized titles of the measures that at least one score has, by name."""
    return {name: strings.get(name, title) for name, title in measure_titles(*scores).items()}


def _percent(measures: Mapping[str, str]) -> list[str]:
    return [f"{title} %" for title in measures.values()]


def _breakdown(system: str, score: Mapping[str, Any], strings: Strings) -> str:
    """Render a system's error rates by speaker, most frequent errors and reliability, all collapsible."""
    measures = _measure_titles(strings, score)
    first = next(iter(measures))
    speakers = sorted(score.get("speakers", {}).items(), key=lambda item: (-item[1][first]["rate"], item[0]))
    rows: list[Row] = [
        ("", [escape(name), f"{group['utterances']:,}", *(f"{100 * group[m]['rate']:.2f}" for m in measures)])
        for name, group in speakers[:_MAX_SPEAKERS]
    ]
    header = [strings("speaker"), strings("utterances"), *_percent(measures)]
    by_speaker = table(header, rows) if rows else ""
    if len(speakers) > _MAX_SPEAKERS:
        by_speaker += note(strings("more_rows", len(speakers) - _MAX_SPEAKERS))
    confusions = []
    for measure, title in measures.items():
        if pairs := score.get("confusions", {}).get(measure):
            as_kana = measure == "wer" and "per" in score
            confusions.append(_confusions(title, pairs, as_kana, strings))
    columns = f'<div class="columns">{"".join(confusions)}</div>' if confusions else ""
    name = escape(system)
    return (
        details(f"{strings('by_speaker')}: {name}", by_speaker)
        + details(f"{strings('confusions')}: {name}", columns)
        + _reliability(name, score.get("confidence"), strings)
    )


def _reliability(system: str, measured: Mapping[str, Any] | None, strings: Strings) -> str:
    """Render a collapsible figure of the reliability of a system's word confidences."""
    if not measured:
        return ""
    basis = ", ".join(measured["calibrated_on"]) or strings("not_calibrated")
    numbers = (f"{measured['words']:,}", f"{100 * measured['calibration_error']:.1f}", escape(basis))
    picture = figure(figures.reliability(measured["bins"]), strings("reliability_caption", *numbers))
    return details(f"{strings('reliability')}: {system}", picture)


def _confusions(title: str, pairs: Sequence[tuple[str, str, int]], as_kana: bool, strings: Strings) -> str:
    rows: list[Row] = []
    for reference, hypothesis, count in pairs[:_MAX_CONFUSIONS]:
        kind = "ins" if not reference else "del" if not hypothesis else "sub"
        cells = [
            f'<span class="{kind}">&nbsp;{escape(display_text(side, as_kana) if side else "–")}&nbsp;</span>'
            for side in (reference, hypothesis)
        ]
        rows.append(("", [*cells, f"{count:,}"]))
    header = [strings("reference"), strings("hypothesis"), strings("count")]
    return f"<div><h4>{title}</h4>{table(header, rows, '')}</div>"


# --- units ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BestLayer:
    name: str
    pnmi: float
    n_units: int


def _best_layer(layers: LayerQuality, strings: Strings) -> _BestLayer:
    """Find the layer with the highest PNMI among the layers measured with equal K."""
    pnmi, name, n_units = max(
        (quality["pnmi"], f"{model}, {strings('layer', number)}", quality["n_units"])
        for model, qualities in layers.models.items()
        for number, quality in enumerate(qualities, 1)
    )
    return _BestLayer(name, pnmi, n_units)


def _units(data: PageData, strings: Strings) -> str:
    units = data.summary["units"]
    parts = [_equal_k(data.layers, units, strings)] if data.layers else []
    named = {**units}
    for experiment, content in data.summary.get("others", {}).items():
        named |= {f"{experiment}: {name}": unit for name, unit in content["units"].items()}
    if named:
        parts.append(f"<h3>{strings('iteration_units')}</h3>{_units_table(named, strings)}")
    usage = []
    for name, usage_K in data.counts.usage.items():
        caption = f"{_unit_title(name, units[name], strings)}: {strings('usage_caption')}"
        usage.append(figure(figures.unit_usage(usage_K), caption))
    parts.append(details(strings("usage"), f'<div class="figures">{"".join(usage)}</div>' if usage else ""))
    matrices = []
    for name, count_PK in data.counts.joint.items():
        caption = f"{_unit_title(name, units[name], strings)}: {strings('matrix_caption')}"
        picture = figure(figures.phone_matrix(count_PK, data.counts.phones), caption, "photo")
        matrices.append(f'<div class="scroll wide">{picture}</div>')
    parts.append(details(strings("matrix"), "".join(matrices)))
    return "".join(parts)


def _equal_k(layers: LayerQuality, units: Mapping[str, Any], strings: Strings) -> str:
    """Render the quality of units (equal K) from MFCCs and from the best and the clustered layers."""
    best = _best_layer(layers, strings)
    clustered = {(f"iter{_number(name) - 1}", unit["layer"]) for name, unit in units.items() if unit["layer"]}
    rows: list[Row] = [("", ["MFCC", *_qualities(layers.mfcc), ""])]
    for model, qualities in layers.models.items():
        for number, quality in enumerate(qualities, 1):
            name = f"{model}, {strings('layer', number)}"
            marks = [strings("clustered_layer")] if (model, number) in clustered else []
            if name == best.name:
                marks.append(strings("best_layer"))
            if marks:
                kind = "best" if name == best.name else ""
                rows.append((kind, [name, *_qualities(quality), ", ".join(marks)]))
    header = [strings("feature"), "K", "PNMI", strings("phone_purity"), strings("cluster_purity"), ""]
    mfcc = layers.mfcc["pnmi"]
    key = "layer_above" if best.pnmi > mfcc else "layer_below"
    values = {"layer": best.name, "pnmi": f"{best.pnmi:.3f}", "mfcc": f"{mfcc:.3f}"}
    title = strings("equal_k", k=min(LAYER_UNITS, best.n_units), frames=f"{layers.n_frames:,}")
    curves = figure(figures.layer_curves(layers), strings("layer_curves"))
    return f'<p class="statement">{strings(key, **values)}</p><h3>{title}</h3>{table(header, rows)}{curves}'


def _number(iteration: str) -> int:
    return int(iteration.removeprefix("iter"))


def _qualities(quality: Mapping[str, Any]) -> list[str]:
    measures = ("pnmi", "phone_purity", "cluster_purity")
    return [
        str(quality["n_units"]),
        *(f"{quality[name]:.3f}" if name in quality else "" for name in measures),
    ]


def _units_table(units: Mapping[str, Any], strings: Strings) -> str:
    measures = ["PNMI", strings("phone_purity"), strings("cluster_purity")]
    if not any("pnmi" in unit for unit in units.values()):  # the times of the phones are unknown
        measures = []
    header = [strings("units"), "K", *measures, strings("used")]
    rows: list[Row] = [
        (
            "",
            [
                escape(_unit_title(name, unit, strings)),
                *_qualities(unit)[: 1 + len(measures)],
                str(unit["used"]),
            ],
        )
        for name, unit in units.items()
    ]
    sources = {unit["phones"] for unit in units.values() if "phones" in unit}
    notes = [strings("phone_times", escape(_source(source, strings))) for source in sorted(sources)]
    if len({unit["n_units"] for unit in units.values()}) > 1:
        notes.insert(0, strings("unequal_k_note"))
    return table(header, rows) + "".join(map(note, notes))


def _source(source: str, strings: Strings) -> str:
    if source == "corpus":
        return strings("source_corpus")
    return strings("source_alignment", source.removeprefix("forced alignment by "))


def _unit_title(name: str, unit: Mapping[str, Any], strings: Strings) -> str:
    """Return a title that gives the iteration and feature of units, e.g. "iter2: layer 6"."""
    feature = str(unit["feature"]).upper() if unit["layer"] is None else strings("layer", unit["layer"])
    experiment, separator, iteration = name.rpartition(": ")
    model = iteration if unit["pretrained_on"] else strings("last_model")
    return f"{experiment}{separator}{model}: {feature}"


# --- examples ---------------------------------------------------------------------------------------------


def _examples(systems: Mapping[str, Mapping[str, Sequence[Example]]], strings: Strings) -> str:
    parts = []
    for system, groups in systems.items():
        parts.append(f"<h3>{escape(system)}</h3>")
        for group, examples in groups.items():
            if examples:
                parts.append(f"<h4>{strings(group)}</h4>")
                parts += [_example(example, strings) for example in examples]
    if not parts:
        return ""
    kinds = (("sub", "substitution"), ("del", "deletion"), ("ins", "insertion"))
    colors = " ".join(f'<span class="{kind}">&nbsp;{strings(name)}&nbsp;</span>' for kind, name in kinds)
    return note(f"{colors} · {strings('examples_note')}") + "".join(parts)


def _example(example: Example, strings: Strings) -> str:
    audio = f'<audio controls preload="metadata" src="{example.audio}"></audio>' if example.audio else ""
    if example.figure:
        picture = image(example.figure, f"{strings('picture')}: {example.id}")
        picture = f'<div class="scroll">{picture}</div>'
    else:
        picture = note(escape(example.note))
    facts = [escape(example.id), escape(example.split), strings("seconds", f"{example.seconds:.1f}")]
    for name, title in _measure_titles(strings, example.errors).items():
        errors = example.errors[name]
        facts.append(f"{title} {100 * errors.rate:.0f} % ({errors.errors}/{errors.length})")
    sides = [strings("reference"), strings("hypothesis")]
    columns = [f'<span class="note">{"".join(f"<span>{title}</span>" for title in sides)}</span>']
    for pair in example.word_pairs:
        cells = "".join(_marked([pair], side, example.has_phones, "span") for side in (0, 1))
        columns.append(f"<span>{cells}</span>")
    symbols = "".join(
        f"<tr><th>{title}</th>{_marked(example.symbol_pairs, side, False, 'td')}</tr>"
        for side, title in enumerate(sides)
    )
    symbol_table = f'<div class="scroll"><table class="symbols">{symbols}</table></div>'
    return (
        f'<div class="example"><p><b>{escape(example.text or example.id)}</b></p>{note(" · ".join(facts))}'
        f'<div class="pairs">{"".join(columns)}</div>'
        f"{audio}{picture}{details(strings('symbols'), symbol_table)}</div>"
    )


def _marked(pairs: Sequence[tuple[Any, Any]], side: int, as_kana: bool, tag: str) -> str:
    """Render one side of an alignment, marking each error with a CSS class."""
    cells = []
    for pair in pairs:
        kind = "" if pair[0] == pair[1] else "ins" if pair[0] is None else "del" if pair[1] is None else "sub"
        item = pair[side]
        if item is None:
            text = "–"
        else:
            text = display_text(item if isinstance(item, str) else " ".join(item), as_kana)
        cells.append(f'<{tag} class="{kind}">{escape(text)}</{tag}>')
    return "".join(cells)


# --- training, comparison, settings -----------------------------------------------------------------------


def _training(experiments: Mapping[str, Path], strings: Strings) -> str:
    """Render collapsible training curves. All experiments share the same figures."""
    stages: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for experiment, exp in experiments.items():
        for path in sorted(exp.glob("**/metrics.jsonl")):
            stages.setdefault(str(path.parent.relative_to(exp)), {})[experiment] = read_metrics(path)
    parts = []
    for stage, runs in stages.items():
        plots = [
            figure(uri, strings.get(f"metric_{name}", name)) for name, uri in figures.curves(runs).items()
        ]
        if plots:
            colors = figures.run_colors(runs)
            legend = [
                f'<span class="legend" style="color:{color}">━ {escape(name)}</span>'
                for name, color in colors.items()
            ]
            legend = legend if len(legend) > 1 else []
            lines = [f"━ {strings('training_line')}", f"╌ {strings('validation_line')}"]
            caption = note(" ".join([*legend, *lines, "·", strings("training_note")]))
            parts.append(details(escape(stage), f'{caption}<div class="figures">{"".join(plots)}</div>'))
    return "".join(parts)


def _comparison(experiments: Mapping[str, Path], strings: Strings) -> str:
    """Render the settings, except inputs, that differ between experiments, for the stages that all have."""
    if len(experiments) < 2:
        return ""
    records = {name: stage_records(exp) for name, exp in experiments.items()}
    common = set.intersection(*(set(stages) for stages in records.values()))
    rows: list[Row] = []
    for stage in sorted(common):
        settings = [stages[stage]["settings"] for stages in records.values()]
        for key in sorted(set().union(*settings)):
            values = [each.get(key) for each in settings]
            is_input = any(isinstance(value, str) and _is_fingerprint(value) for value in values)
            if not is_input and any(value != values[0] for value in values):
                rows.append(("", [escape(f"{stage}: {key}"), *(escape(_value(value)) for value in values)]))
    if not rows:
        return note(strings("no_differences"))
    return table([strings("setting"), *map(escape, experiments)], rows)


def _settings(records: Mapping[str, Any], strings: Strings) -> str:
    parts = []
    for folder, record in sorted(records.items(), key=lambda item: item[1]["finished"]):
        made_with = {"fingerprint": record["fingerprint"], strings("finished"): record["finished"]}
        for key, value in record["made_with"].items():
            made_with[strings.get(key, key)] = value
        rows: list[Row] = [
            ("", [escape(key), escape(_value(value))])
            for key, value in {**record["settings"], **made_with}.items()
        ]
        parts.append(details(escape(folder), table([], rows, "text"), strings.duration(record["seconds"])))
    return "".join(parts)


def _rate(score: Mapping[str, float]) -> str:
    interval = f"[{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
    return f"<span>{100 * score['rate']:.2f} <small>{interval}</small></span>"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:16]}…" if _is_fingerprint(text) else text


def _is_fingerprint(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
