"""Conversion of models to other formats, verified by reading and running the result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.atomic import atomic_path, remove_leftovers
from jahubert.formats.bundle import CALIBRATION_KEY, INFO_KEYS, Bundle, load_bundle, save_bundle
from jahubert.formats.fairseq import write_fairseq
from jahubert.formats.torchaudio import write_torchaudio
from jahubert.formats.typed_fields import read_json
from jahubert.frames import SAMPLE_RATE

FORMATS = ("hf", "fairseq", "torchaudio", "onnx")
SUFFIXES = (".pt", ".pth")  # .json is reserved for the settings of torchaudio models
TOLERANCE = 1e-3  # maximum difference of outputs; permuted rows may be rounded differently


@dataclass(frozen=True)
class Conversion:
    """Result of a verified conversion."""

    notes: tuple[str, ...]  # one message per change to the model
    difference: float  # largest absolute difference between the compared outputs, on random audio


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Literal["hf", "fairseq", "torchaudio", "onnx"],
    calibration: dict[str, float] | None = None,
) -> Conversion:
    """Convert a model in any format that `load_bundle` reads, and verify the outputs of the result.

    The target is a folder for "hf", and a file for the other formats. With "hf", `calibration` (the output of
    `Calibration.to_json`) is stored as the calibration of word confidences.

    Raises:
        CheckpointError: the source cannot be read, the target format cannot represent the model, or the
            outputs of the written model differ from the outputs of the source.
        ConfigError: the target exists, has the wrong suffix or cannot be written, the format is unknown, or a
            calibration is given for another format than "hf".
        MissingExtraError: a package that ONNX export or a Hub name needs is not installed.
        OSError: writing failed, for example because the disk is full.
    """
    target = Path(target)
    _check_target(target, to)
    if calibration is not None and to != "hf":
        raise ConfigError(f"{to} files cannot store a calibration; convert to hf, or omit it")
    bundle = load_bundle(source)
    notes = list(bundle.notes)
    if to != "hf":
        notes += _dropped_parts(bundle, to)
    if to == "hf":
        _write_bundle(target, bundle, {} if calibration is None else {CALIBRATION_KEY: calibration})
    elif to == "onnx":
        difference = _write_onnx(target, bundle)
    else:
        notes += _write_file(target, bundle, to)
    if to != "onnx":
        difference = largest_difference(bundle, load_bundle(target))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{target} was written, but its outputs differ from those of {source} by up to {difference:.2g}; "
            "do not use the result, and report this problem"
        )
    return Conversion(tuple(notes), difference)


def largest_difference(first: Bundle, second: Bundle) -> float:
    """Compute the largest absolute difference between the outputs of two models on random audio.

    The outputs of layers, CTC heads and unit heads are compared, except for heads that only one of the models
    has. CTC symbols are matched by name if both models name them. The audio is noise with unit variance, so
    that the epsilon of waveform normalization has almost no effect. The result is NaN if an output is NaN.
    """
    wav_BT = torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    n_samples = [SAMPLE_RATE, SAMPLE_RATE * 5 // 8]
    pairs: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        layers = range(first.config.layers + 1)
        a, b = (bundle.model(wav_BT, n_samples, keep_layers=layers) for bundle in (first, second))
        pairs += [(a.layers[layer], b.layers[layer]) for layer in layers]
        pairs.append((a.hidden_BSD, b.hidden_BSD))
        if first.ctc is not None and second.ctc is not None:
            rows = _matching_rows(first, second)
            logp_a, logp_b = first.ctc.log_probs(a.hidden_BSD), second.ctc.log_probs(b.hidden_BSD)
            pairs.append((logp_a[..., list(rows)], logp_b[..., list(rows.values())]))
        if first.unit_head is not None and second.unit_head is not None:
            logits = [
                bundle.unit_head(encoded.hidden_BSD.flatten(0, 1))
                for bundle, encoded in ((first, a), (second, b))
                if bundle.unit_head is not None
            ]
            pairs.append((logits[0], logits[1]))
    return float(torch.stack([(x - y).abs().max() for x, y in pairs]).max())  # unlike `max`, this keeps NaN


def _check_target(target: Path, to: str) -> None:
    """Raise ConfigError if the format is unknown, or the target exists, is misnamed or is not writable."""
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}")
    suffixes = (".onnx",) if to == "onnx" else SUFFIXES
    if to != "hf" and target.suffix not in suffixes:
        raise ConfigError(f"{target}: {to} files end in {' or '.join(suffixes)}; choose another name")
    for path in (target, target.with_suffix(".json")) if to == "torchaudio" else (target,):
        # If the target already exists, no write follows that would remove the leftovers.
        remove_leftovers(path.parent, path.name)
        if path.exists() and not _is_leftover(path):
            raise ConfigError(f"{path} already exists; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{target}: no permission to write to {target.parent}")


def _is_leftover(path: Path) -> bool:
    """Return whether `path` is a torchaudio settings file without weights, as an interrupted run leaves."""
    if path.suffix != ".json" or any(path.with_suffix(suffix).exists() for suffix in SUFFIXES):
        return False
    try:
        return str(read_json(path).get("factory")).startswith("torchaudio.models.")
    except CheckpointError:
        return False


def _write_bundle(target: Path, bundle: Bundle, info: dict[str, Any]) -> None:
    save_bundle(
        target,
        model=bundle.model,
        ctc=bundle.ctc,
        phonemes=bundle.phonemes,
        unit_head=bundle.unit_head,
        centroids_KD=bundle.centroids_KD,
        centroid_layer=bundle.centroid_layer,
        info={name: value for name, value in bundle.info.items() if name not in INFO_KEYS} | info,
        special_rows=bundle.special_rows,
        language_model=bundle.language_model,
    )


def _write_onnx(target: Path, bundle: Bundle) -> float:
    from jahubert.formats.onnx import write_onnx  # importing torch.export is slow

    with atomic_path(target) as temporary:
        return write_onnx(temporary, bundle)


def _write_file(target: Path, bundle: Bundle, to: str) -> list[str]:
    """Write a fairseq or torchaudio file, and return one message per change to the model."""
    parts: dict[str, Any] = {"ctc": bundle.ctc, "phonemes": bundle.phonemes, "unit_head": bundle.unit_head}
    if to == "fairseq":
        notes = write_fairseq(target, bundle.model, special_rows=bundle.special_rows, **parts)
    else:
        notes = write_torchaudio(target, bundle.model, **parts)
        if bundle.special_rows is not None:
            notes.append("codebook: fairseq's four special rows were dropped")
    return notes


def _dropped_parts(bundle: Bundle, to: str) -> list[str]:
    """Return one message for each part of the bundle that no file in the format can store."""
    parts = {
        "pretraining head": to == "onnx" and bundle.unit_head is not None,
        "centroids": bundle.centroids_KD is not None,
        "n-gram": bundle.language_model is not None,
        "confidence calibration": CALIBRATION_KEY in bundle.info,
        "origin of the model (jahubert.json)": bool(set(bundle.info) - {*INFO_KEYS, CALIBRATION_KEY}),
    }
    return [
        f"{part}: dropped, because {to} files cannot store this" for part, exists in parts.items() if exists
    ]


def _matching_rows(first: Bundle, second: Bundle) -> dict[int, int]:
    """Map rows of the first CTC head to those of the second with the same symbols, omitting other rows."""
    if first.phonemes is None or second.phonemes is None:
        return {row: row for row in range(first.ctc.lm_head.out_features)} if first.ctc else {}
    rows = {symbol: row for row, symbol in enumerate(second.phonemes.symbols)}
    return {row: rows[symbol] for row, symbol in enumerate(first.phonemes.symbols) if symbol in rows}
