"""The numbers of a run, all read from what the stages wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jahubert.errors import DataError
from jahubert.formats.bundle import load_bundle
from jahubert.frames import HUBERT
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation.layer_quality import PhoneFrames
from jahubert.train.evaluation.metrics import cluster_quality, joint_counts, phone_frames
from jahubert.train.evaluation.scoring import measures_of, phone_wer, published_table
from jahubert.train.evaluation.unit_checks import usage_statistics
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.report.results import results_of

LAYER_UNITS = 100  # for each layer, as many as there are of MFCCs in the recipe


@dataclass(frozen=True)
class UnitCounts:
    """How often the units of each iteration occur, and with which phones, where phone times are known."""

    usage: dict[str, np.ndarray]  # "iter1" -> (K,) of all frames
    phones: list[str]
    source: str  # of the phone times
    counts: dict[str, np.ndarray]  # "iter1" -> (P, K) of the frames whose phone is known


def summarize(exp: Path, counted: UnitCounts, others: Sequence[Path] = ()) -> dict[str, Any]:
    """Systems with their scores, those of other experiments too, and units with their quality.

    Raises:
        DataError: another experiment has no scores.
    """
    corpus = read_record(exp / "prepare" / DONE)["metrics"]
    systems = {result.name: result.summary() for result in results_of(exp)}
    for other in others:
        theirs = {f"{other.name}: {result.name}": result.summary() for result in results_of(other)}
        if not theirs:
            raise DataError(f"report.compare_with: {other} has no scores; run stage=score there first")
        systems |= theirs
    seconds = {
        str(path.parent.relative_to(exp)): read_record(path)["seconds"]
        for path in sorted(exp.glob(f"**/{DONE}"))
    }
    return {"corpus": corpus, "systems": systems, "units": unit_quality(exp, counted), "seconds": seconds}


def label_stores(exp: Path) -> dict[str, LabelStore]:
    """The finished units of an experiment by the name of their iteration."""
    return {
        path.parent.parent.name: LabelStore(path.parent) for path in sorted(exp.glob(f"iter*/label/{DONE}"))
    }


def phone_times(exp: Path, manifest: Manifest) -> tuple[dict[int, tuple[Phone, ...]], str]:
    """Phones of each row that has any, and where they are from.

    The times are the corpus's own where it has them, else forced alignments that `decode` wrote.
    """
    times: dict[int, tuple[Phone, ...]] = {}
    with progress("phone times", "utterances", len(manifest)) as done:
        for row in range(len(manifest)):
            if phones := manifest[row].alignment:
                times[row] = phones
            done(1)
    if times:
        return times, "corpus"
    for path in sorted(exp.glob("systems/*/decode/alignment.jsonl")):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        times = {line["row"]: tuple(Phone(*phone) for phone in line["phones"]) for line in lines}
        return times, f"forced alignment by {path.parent.parent.name}"
    return {}, ""


def unit_counts(exp: Path, times: dict[int, tuple[Phone, ...]], source: str) -> UnitCounts:
    """Units, and phones against units frame by frame, of what `phone_times` gives."""
    stores = label_stores(exp)
    usage = {name: store.unit_counts() for name, store in stores.items()}
    if not times:
        return UnitCounts(usage, [], "", {})
    names = sorted({phone.symbol for alignment in times.values() for phone in alignment})
    index = {name: number for number, name in enumerate(names)}
    counts = {}
    for name, store in stores.items():
        phones, units = [], []
        with progress(f"units of {name} and phones", "utterances", len(times)) as done:
            for row, alignment in times.items():
                unit_S = store[row]
                said = phone_frames(alignment, len(unit_S), HUBERT)
                known = [frame for frame, phone in enumerate(said) if phone is not None]
                phones += [index[said[frame]] for frame in known]  # type: ignore[index]
                units.append(np.asarray(unit_S)[known].astype(np.int64))
                done(1)
        counts[name] = joint_counts(np.array(phones), np.concatenate(units), len(names), store.header.n_units)
    return UnitCounts(usage, names, source, counts)


def layer_curves(
    exp: Path, times: dict[int, tuple[Phone, ...]], n_frames: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Quality of units of MFCCs and of every block of each iteration's model, all on the same frames."""
    models = sorted(path.parent for path in exp.glob(f"iter*/pretrain/{DONE}"))
    if not (times and models and n_frames):
        return {}
    frames = PhoneFrames(Manifest(exp / "prepare" / "manifest.arrow"), times, n_frames, seed)
    if not len(frames):
        return {}
    curves: dict[str, Any] = {
        "frames": len(frames),
        "mfcc": [frames.quality(frames.mfcc(), LAYER_UNITS, seed)],
    }
    for folder in models:
        layers = frames.layers(load_bundle(folder).model, device)
        name = folder.parent.name
        curves[name] = []
        with progress(f"units of each layer of {name}", "layers", len(layers)) as done:
            for frame_ND in layers:
                curves[name].append(frames.quality(frame_ND, LAYER_UNITS, seed))
                done(1)
    return curves


def unit_quality(exp: Path, counted: UnitCounts) -> dict[str, Any]:
    """Use, cluster purity, phone purity and PNMI of each iteration's units against phone times."""
    stores, result = label_stores(exp), {}
    for name, usage_K in counted.usage.items():
        header = stores[name].header
        against_phones = {}
        if name in counted.counts:
            count_PK = counted.counts[name]
            against_phones = {"frames": int(count_PK.sum()), "phones": counted.source}
            against_phones |= cluster_quality(count_PK)
        result[name] = {
            "learnt": (exp / name / "pretrain" / DONE).exists(),  # else they are the last model's own units
            "feature": header.feature,
            "layer": header.layer,
            "n_units": header.n_units,
            **against_phones,
            **usage_statistics(usage_K),
        }
    return result


def table(summary: dict[str, Any]) -> str:
    """All tables as text."""
    ours = [(system["label"], phone_wer(system["scores"])) for system in summary["systems"].values()]
    width = max(18, *(len(name) + 2 for name in summary["systems"]), 0)
    lines = [published] if (published := published_table(summary["published"], ours)) else []
    for split in sorted({split for system in summary["systems"].values() for split in system["scores"]}):
        lines += [f"Recognition on {split} (95 % intervals in brackets)"]
        lines += [
            f"  {'system':<{width}}{'labels':>9}{'updates':>9}   {'PER %':<25}{'WER %':<25}{'kana CER %':<10}"
        ]
        for name, system in summary["systems"].items():
            if split in system["scores"]:
                score = system["scores"][split]
                cells = [_cell(score.get("per")), _cell(score.get("wer"))]
                cells += [_cell(score.get("kana_cer", score.get("cer")))]
                labels = (
                    f"{system['hours'] * 60:.1f} min" if system["hours"] < 10 else f"{system['hours']:.0f} h"
                )
                named = f"  {name:<{width}}{labels:>9}{system['updates']:>9}"
                lines += [f"{named}   {cells[0]:<25}{cells[1]:<25}{cells[2]}"]
        lines += [""]
    notes = {
        title: one["normaliser"]
        for system in summary["systems"].values()
        for score in system["scores"].values()
        for title, one in measures_of(score)
    }
    lines += [f"{title}: {normaliser}" for title, normaliser in notes.items()] + [""] * bool(notes)
    measured = {name: unit for name, unit in summary["units"].items() if "pnmi" in unit}
    if measured:
        source = next(iter(measured.values()))["phones"]
        lines += [f"Units against the phones of each frame (phone times: {source})"]
        lines += [f"  {'units':<24}{'K':>5}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}"]
        for name, unit in measured.items():
            name = name if unit["learnt"] else "last model"
            feature = unit["feature"] if unit["layer"] is None else f"layer {unit['layer']}"
            lines += [
                f"  {name + ': ' + feature:<24}{unit['n_units']:>5}{unit['pnmi']:>8.3f}"
                f"{unit['phone_purity']:>14.3f}{unit['cluster_purity']:>16.3f}"
            ]
    return "\n".join(lines).rstrip()


def _cell(score: dict[str, float] | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score['rate']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
