"""Numbers, curves and one HTML page of a run, all read from what the stages wrote."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.errors import DataError, MissingExtraError
from jahubert.frames import HUBERT
from jahubert.train.labels import LabelStore
from jahubert.train.manifest import Manifest, Phone
from jahubert.train.metrics import cluster_quality, phone_frames
from jahubert.train.provenance import DONE, read_record


def summarize(exp: Path) -> dict[str, Any]:
    """Systems with their scores, and units with their quality.

    Raises:
        DataError: the experiment has no prepared corpus.
    """
    if not (exp / "prepare" / DONE).exists():
        raise DataError(f"{exp}: nothing to report yet; run stage=prepare and the stages after it first")
    corpus = read_record(exp / "prepare" / DONE)["metrics"]
    systems = {}
    for folder in sorted((exp / "systems").glob("*")):
        if (folder / "score" / DONE).exists():
            finetune = read_record(folder / "finetune" / DONE)
            systems[folder.name] = {
                "updates": finetune["settings"]["train.max_steps"],
                "hours": finetune["metrics"]["hours"],
                "utterances": finetune["metrics"]["utterances"],
                "scores": json.loads((folder / "score" / "scores.json").read_text(encoding="utf-8")),
            }
    seconds = {
        str(path.parent.relative_to(exp)): read_record(path)["seconds"]
        for path in sorted(exp.glob(f"**/{DONE}"))
    }
    return {"corpus": corpus, "systems": systems, "units": unit_quality(exp), "seconds": seconds}


def unit_quality(exp: Path) -> dict[str, Any]:
    """Cluster purity, phone purity and PNMI of each iteration's units against phone times.

    The times are the corpus's own where it has them, else forced alignments that `decode` wrote.
    """
    stores = {
        path.parent.parent.name: LabelStore(path.parent) for path in sorted(exp.glob(f"iter*/label/{DONE}"))
    }
    if not stores:
        return {}
    manifest = Manifest(exp / "prepare" / "manifest.arrow")
    times = {row: manifest[row].alignment for row in range(len(manifest))}
    times = {row: phones for row, phones in times.items() if phones}
    source = "corpus"
    if not times:
        source = "forced alignment"
        for path in sorted(exp.glob("systems/*/decode/alignment.jsonl")):
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            times = {line["row"]: tuple(Phone(*phone) for phone in line["phones"]) for line in lines}
            source = f"forced alignment by {path.parent.parent.name}"
            break
    if not times:
        return {}
    names: dict[str, int] = {}
    result = {}
    for name, store in stores.items():
        phones, units = [], []
        for row, alignment in times.items():
            unit_S = store[row]
            said = phone_frames(alignment, len(unit_S), HUBERT)
            known = [frame for frame, phone in enumerate(said) if phone is not None]
            phones += [names.setdefault(said[frame], len(names)) for frame in known]  # type: ignore[arg-type]
            units.append(np.asarray(unit_S)[known].astype(np.int64))
        quality = cluster_quality(np.array(phones), np.concatenate(units), len(names), store.header.n_units)
        result[name] = {
            "feature": store.header.feature,
            "layer": store.header.layer,
            "n_units": store.header.n_units,
            "frames": len(phones),
            "phones": source,
            **quality,
        }
    return result


def table(summary: dict[str, Any]) -> str:
    """The two tables as text."""
    lines = []
    for split in sorted({split for system in summary["systems"].values() for split in system["scores"]}):
        lines += [f"Recognition on {split} (95 % intervals in brackets)"]
        lines += [
            f"  {'system':<18}{'labels':>9}{'updates':>9}   {'PER %':<25}{'WER %':<25}{'kana CER %':<10}"
        ]
        for name, system in summary["systems"].items():
            if split in system["scores"]:
                score = system["scores"][split]
                cells = [_cell(score[measure]) for measure in ("per", "wer", "kana_cer")]
                labels = (
                    f"{system['hours'] * 60:.1f} min" if system["hours"] < 10 else f"{system['hours']:.0f} h"
                )
                lines += [
                    f"  {name:<18}{labels:>9}{system['updates']:>9}   {cells[0]:<25}{cells[1]:<25}{cells[2]}"
                ]
        lines += [""]
    if summary["units"]:
        source = next(iter(summary["units"].values()))["phones"]
        lines += [f"Units against the phones of each frame (phone times: {source})"]
        lines += [f"  {'units':<24}{'K':>5}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}"]
        for name, unit in summary["units"].items():
            feature = unit["feature"] if unit["layer"] is None else f"layer {unit['layer']}"
            lines += [
                f"  {name + ': ' + feature:<24}{unit['n_units']:>5}{unit['pnmi']:>8.3f}"
                f"{unit['phone_purity']:>14.3f}{unit['cluster_purity']:>16.3f}"
            ]
    return "\n".join(lines).rstrip()


def _cell(score: dict[str, float]) -> str:
    return f"{100 * score['rate']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"


def page(exp: Path, summary: dict[str, Any], text: str) -> str:
    """One self-contained HTML page: tables, curves, what each stage took."""
    curves = {
        str(path.parent.relative_to(exp)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(exp.glob("**/metrics.jsonl"))
    }
    figures = "\n".join(
        f"<h2>{html.escape(name)}</h2>\n<img alt='curves of {html.escape(name)}' src='{_curve(rows)}'>"
        for name, rows in curves.items()
        if rows
    )
    took = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{v:.0f} s</td></tr>" for k, v in summary["seconds"].items()
    )
    style = (
        "body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{overflow-x:auto}img{max-width:100%}"
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(exp.name)}</title><style>{style}</style>"
        f"<h1>{html.escape(exp.name)}</h1><pre>{html.escape(text)}</pre>{figures}"
        f"<h2>Time of each stage</h2><table>{took}</table></html>\n"
    )


def _curve(rows: list[dict[str, Any]]) -> str:
    """Every metric against the step as a PNG in a data address; training and validation in one frame."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    skip = ("step", "timing")
    names = list(dict.fromkeys(key.removeprefix("valid_") for row in rows for key in row if key not in skip))
    figure = Figure(figsize=(3.2 * min(4, len(names)), 2.6 * -(-len(names) // 4)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 4), min(4, len(names)), number + 1)
        for key, label in ((name, "training"), (f"valid_{name}", "validation")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
