"""Statistics of the units in an experiment: usage, agreement with phones, and quality of every layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jahubert.formats.bundle import load_bundle
from jahubert.frames import HUBERT
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation.layer_quality import PhoneFrames
from jahubert.train.evaluation.metrics import cluster_quality, joint_counts, phone_frames
from jahubert.train.evaluation.unit_checks import usage_statistics
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import DONE

LAYER_UNITS = 100  # number of units fitted to each layer and to MFCCs; fewer if there are too few frames


@dataclass(frozen=True)
class UnitCounts:
    """Frame counts of the units of each iteration ("iter1", ...)."""

    usage: dict[str, np.ndarray]  # number of frames per unit (K,)
    phones: list[str]
    source: str  # source of the phone times
    joint: dict[str, np.ndarray]  # number of frames per phone and unit (P, K), if phone times are available


@dataclass(frozen=True)
class LayerQuality:
    """Quality of units that were fitted to MFCCs and to each layer of each model, on the same frames.

    Each dict is the result of `PhoneFrames.quality`.
    """

    n_frames: int
    mfcc: dict[str, Any]
    models: dict[str, list[dict[str, Any]]]  # layers 1, 2, ... of each model ("iter1", ...)


def label_stores(exp: Path) -> dict[str, LabelStore]:
    """Open the finished label stores of an experiment, keyed by iteration ("iter1", ...)."""
    return {
        path.parent.parent.name: LabelStore(path.parent) for path in sorted(exp.glob(f"iter*/label/{DONE}"))
    }


def phone_times(exp: Path, manifest: Manifest) -> tuple[dict[int, tuple[Phone, ...]], str]:
    """Return the phones of manifest rows where available, and the source of the phone times.

    The source is the corpus if it has phone times, otherwise the forced alignment by the first system that
    has one, and "" if there are no phone times.
    """
    times: dict[int, tuple[Phone, ...]] = {}
    rows = manifest.indices(has_alignment=True).tolist()
    with progress("phone times", "utterances", len(rows)) as done:
        for row in rows:
            times[row] = manifest[row].alignment
            done(1)
    if times:
        return times, "corpus"
    paths = sorted(exp.glob("systems/*/decode/alignment.jsonl"))
    for path in paths or sorted(exp.glob("systems/*/decode-*/alignment.jsonl")):
        for line in path.read_bytes().splitlines():  # ids may contain Unicode line separators
            item = json.loads(line)
            times[item["row"]] = tuple(Phone(*phone) for phone in item["phones"])
        return times, f"forced alignment by {path.parent.parent.name}"
    return {}, ""


def count_units(exp: Path, times: dict[int, tuple[Phone, ...]], source: str) -> UnitCounts:
    """Count the frames with each unit, and with each pair of phone and unit.

    Args:
        times, source: the result of `phone_times`.
    """
    stores = label_stores(exp)
    usage = {name: store.unit_counts() for name, store in stores.items()}
    if not times:
        return UnitCounts(usage, [], "", {})
    symbols = sorted({phone.symbol for phones in times.values() for phone in phones})
    index = {symbol: number for number, symbol in enumerate(symbols)}
    joint = {}
    for name, store in stores.items():
        phone_parts: list[int] = []
        unit_parts: list[np.ndarray] = []
        with progress(f"units of {name} and phones", "utterances", len(times)) as done:
            for row, alignment in times.items():
                unit_S = np.asarray(store[row])
                phone_S = phone_frames(alignment, len(unit_S), HUBERT)
                has_phone_S = np.array([phone is not None for phone in phone_S], bool)
                phone_parts += [index[phone] for phone in phone_S if phone is not None]
                unit_parts.append(unit_S[has_phone_S].astype(np.int64))
                done(1)
        phone_N, unit_N = np.array(phone_parts), np.concatenate(unit_parts)
        joint[name] = joint_counts(phone_N, unit_N, len(symbols), store.header.n_units)
    return UnitCounts(usage, symbols, source, joint)


def layer_quality(
    exp: Path, times: dict[int, tuple[Phone, ...]], n_frames: int, seed: int, device: torch.device
) -> LayerQuality | None:
    """Fit `LAYER_UNITS` units to MFCCs and to each layer of each iteration's model, and evaluate the units.

    At most `n_frames` frames are used. The result is None if there are no models or no frames with phones, or
    if `n_frames` is 0.
    """
    models = sorted(path.parent for path in exp.glob(f"iter*/pretrain/{DONE}"))
    if not (times and models and n_frames):
        return None
    frames = PhoneFrames(Manifest(exp / "prepare" / "manifest.arrow"), times, n_frames, seed)
    if not len(frames):
        return None
    mfcc = frames.quality(frames.mfcc(), LAYER_UNITS, seed)
    qualities: dict[str, list[dict[str, Any]]] = {}
    for folder in models:
        layers = frames.layers(load_bundle(folder).model, device)
        name = folder.parent.name
        qualities[name] = []
        with progress(f"units of each layer of {name}", "layers", len(layers)) as done:
            for frame_ND in layers:
                qualities[name].append(frames.quality(frame_ND, LAYER_UNITS, seed))
                done(1)
    return LayerQuality(len(frames), mfcc, qualities)


def unit_quality(exp: Path, counts: UnitCounts) -> dict[str, Any]:
    """Return the feature, usage, purities and PNMI of the units in each iteration."""
    stores, result = label_stores(exp), {}
    for name, usage_K in counts.usage.items():
        header = stores[name].header
        against_phones: dict[str, Any] = {}
        if name in counts.joint:
            count_PK = counts.joint[name]
            against_phones = {"frames": int(count_PK.sum()), "phones": counts.source}
            against_phones |= cluster_quality(count_PK)
        result[name] = {
            # False for the units of the last model
            "pretrained_on": (exp / name / "pretrain" / DONE).exists(),
            "feature": header.feature,
            "layer": header.layer,
            "n_units": header.n_units,
            **against_phones,
            **usage_statistics(usage_K),
        }
    return result


def measure_units(exp: Path) -> dict[str, Any]:
    """Compute `unit_quality` for an experiment, using its phone times."""
    times, source = phone_times(exp, Manifest(exp / "prepare" / "manifest.arrow"))
    return unit_quality(exp, count_units(exp, times, source))
