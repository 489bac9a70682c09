"""Models into the formats of other projects: written, read again, and compared before they are done."""

from __future__ import annotations

import math
import os
import pickle
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.bundle import Bundle, load_bundle, save_bundle
from jahubert.formats.fairseq import FIELDS, FINE_TUNED, NEVER, SPECIALS, WRAPPED
from jahubert.formats.state_dict import fairseq_name, portable_state
from jahubert.formats.torchaudio import write_torchaudio
from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import BLANK, PhonemeSet

FORMATS = ("hf", "fairseq", "torchaudio", "onnx")
ENDINGS = (".pt", ".pth")  # of files; not .json, which torchaudio's have beside them
TOLERANCE = 1e-3  # the same weights in another order of rows may round differently, and nothing more
FINAL_DIM = 256  # of a projection that has to be made up


@dataclass(frozen=True)
class Conversion:
    """What a conversion did not keep as it was, and how much the outputs of the two models differ."""

    notes: tuple[str, ...]  # what was dropped or made anew, a sentence each
    difference: float  # the largest absolute one, over all layers and heads, on random audio


def convert(
    source: str | os.PathLike, target: str | os.PathLike, to: Literal["hf", "fairseq", "torchaudio", "onnx"]
) -> Conversion:
    """Write `source`, anything that `load_bundle` opens, as a folder (hf) or file.

    Raises:
        CheckpointError: the source cannot be read, the target format has no such model, or what was written
            gives other results than the source.
        ConfigError: the target exists, has a wrong ending or cannot be written, or there is no such format.
    """
    target = Path(target)
    if to not in FORMATS:
        raise ConfigError(f"no format {to!r}; choose one of {', '.join(FORMATS)}")
    endings = (".onnx",) if to == "onnx" else ENDINGS
    if to != "hf" and target.suffix not in endings:
        raise ConfigError(f"{target}: {to} files end in {' or '.join(endings)}; choose another name")
    for path in (target, target.with_suffix(".json")) if to == "torchaudio" else (target,):
        if path.exists():
            raise ConfigError(f"{path} exists already; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK | os.X_OK):  # before the work, not after it
        raise ConfigError(f"{target}: no permission to write into {target.parent}; choose another place")
    bundle = load_bundle(source)
    notes = list(bundle.notes)
    if to == "hf":
        save_bundle(
            target,
            model=bundle.model,
            ctc=bundle.ctc,
            phonemes=bundle.phonemes,
            unit_head=bundle.unit_head,
            centroids_KD=bundle.centroids_KD,
            centroid_layer=bundle.centroid_layer,
            info={name: bundle.info[name] for name in bundle.info if name not in _WRITTEN_ANEW},
            special_rows=bundle.special_rows,
        )
    elif to != "onnx":
        notes += _write_file(target, bundle, to)
    if to == "onnx":
        difference = _onnx(target, bundle)
    else:
        difference = largest_difference(bundle, load_bundle(target))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{target}: written, but its outputs differ from those of {source} by up to {difference:.2g}; "
            "do not use it, and report this"
        )
    return Conversion(tuple(notes), difference)


def _onnx(target: Path, bundle: Bundle) -> float:
    from jahubert.formats.onnx import write_onnx  # torch.export takes a while to import

    beside = target.with_name(target.stem + ".tmp" + target.suffix)
    difference = write_onnx(beside, bundle)
    beside.replace(target)
    return difference


# Of jahubert.json; save_bundle knows them better.
_WRITTEN_ANEW = ("format", "config", "temperature", "phonemes", "centroid_layer", "weights")


def _write_file(target: Path, bundle: Bundle, to: str) -> list[str]:
    """Write one file, which appears under its name when it is whole."""
    beside = target.with_name(target.stem + ".tmp" + target.suffix)
    parts: dict[str, Any] = {"ctc": bundle.ctc, "phonemes": bundle.phonemes, "unit_head": bundle.unit_head}
    if to == "fairseq":
        notes = write_fairseq(beside, bundle.model, special_rows=bundle.special_rows, **parts)
    else:
        notes = write_torchaudio(beside, bundle.model, **parts)
        beside.with_suffix(".json").replace(target.with_suffix(".json"))
        if bundle.special_rows is not None:
            notes.append("codebook: fairseq's four special rows were dropped")
    beside.replace(target)
    if bundle.centroids_KD is not None:
        notes.append(f"centroids: {to} has no place for them, so they were dropped")
    if set(bundle.info) - set(_WRITTEN_ANEW):
        notes.append(f"record of where the model came from (jahubert.json): {to} has no place for it")
    return notes


def largest_difference(one: Bundle, other: Bundle) -> float:
    """The largest absolute difference of all layers, log-probabilities and unit logits on random audio.

    The noise has unit variance, where the epsilons of normalisation do not show. Heads that only one of the
    two has are not compared; symbols are compared by name.
    """
    wav_BT = torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    n_samples = [SAMPLE_RATE, SAMPLE_RATE * 5 // 8]
    pairs: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        keep = range(one.config.layers + 1)
        a, b = (x.model(wav_BT, n_samples, keep_layers=keep) for x in (one, other))
        pairs += [(a.layers[layer], b.layers[layer]) for layer in keep] + [(a.hidden_BSD, b.hidden_BSD)]
        if one.ctc is not None and other.ctc is not None:
            rows = _same_symbols(one, other)
            logps = one.ctc.log_probs(a.hidden_BSD), other.ctc.log_probs(b.hidden_BSD)
            pairs.append((logps[0][..., list(rows)], logps[1][..., list(rows.values())]))
        if one.unit_head is not None and other.unit_head is not None:
            pairs.append(
                (one.unit_head(a.hidden_BSD.flatten(0, 1)), other.unit_head(b.hidden_BSD.flatten(0, 1)))
            )
    return max(float((x - y).abs().max()) for x, y in pairs)


def _same_symbols(one: Bundle, other: Bundle) -> dict[int, int]:
    """Rows of the two CTC heads that mean the same."""
    if one.phonemes is None or other.phonemes is None:
        return {row: row for row in range(one.ctc.lm_head.out_features)} if one.ctc else {}
    place = {symbol: row for row, symbol in enumerate(other.phonemes.symbols)}
    return {row: place[symbol] for row, symbol in enumerate(one.phonemes.symbols) if symbol in place}


def write_fairseq(
    path: Path,
    model: HubertModel,
    *,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
    special_rows: Tensor | None = None,
) -> list[str]:
    """Write the checkpoint of a pretrained model or, with `ctc`, of a fine-tuned one.

    Returns:
        What was dropped or made anew, a sentence each.

    Raises:
        CheckpointError: fairseq has no such model.
    """
    notes: list[str] = []
    config, tensors = _written_encoder(model, notes)
    tensors |= _written_head(config, ctc is None, unit_head, special_rows, notes)
    n_units = len(tensors["label_embs_concat"]) - len(SPECIALS)
    task: dict[str, Any] = {
        "_name": "hubert_pretraining",
        "data": "",
        "labels": ["km"],
        "sample_rate": SAMPLE_RATE,
    }
    task |= {"label_rate": config.grid.rate, "normalize": config.normalize, "fine_tuning": False}
    temperature = 0.1 if unit_head is None else unit_head.temperature
    settings = _written_settings(config, tensors["label_embs_concat"].shape[1], temperature)
    cfg: dict[str, Any] = {"_name": None, "task": task, "model": settings}
    task_state: dict[str, Any] = {"dictionaries": [_Dictionary([*SPECIALS, *map(str, range(n_units))])]}
    if ctc is not None:
        if phonemes is None:
            raise CheckpointError("the CTC head has no symbols, but fairseq wants a dictionary of them")
        proj, symbols = _written_ctc(ctc, phonemes, notes)
        tensors = {WRAPPED + name: value for name, value in tensors.items()} | proj
        tuned = {there: settings[name] for name, there in FINE_TUNED.items()}
        tuned |= {"_name": "hubert_ctc", "w2v_path": "", "w2v_args": cfg, "final_dropout": 0.0, "data": ""}
        again = task | {"fine_tuning": True, "labels": ["ltr"], "label_rate": -1, "single_target": True}
        cfg = {"_name": None, "task": again, "model": tuned | {"normalize": config.normalize}}
        task_state["target_dictionary"] = _Dictionary(symbols)
    past = {"criterion_name": "", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 0}
    content = {
        "args": None,
        "cfg": cfg,
        "model": tensors,
        "task_state": task_state,
        "optimizer_history": [past],
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    torch.save(content, path, pickle_module=_PICKLE)
    return notes


def _written_encoder(model: HubertModel, notes: list[str]) -> tuple[HubertConfig, dict[str, Tensor]]:
    """The encoder under fairseq's names, and the config that is true of it there."""
    state = portable_state(model, "fairseq", notes)
    config = replace(model.config, conv_bias="feature_extractor.conv_layers.0.conv.bias" in state)
    if config.conv_dims[-1] == config.width:
        weight, bias = (state.pop(f"feature_projection.projection.{part}") for part in ("weight", "bias"))
        if bias.any() or not weight.equal(torch.eye(config.width)):
            raise CheckpointError(
                f"the front end is as wide as the encoder ({config.width}); fairseq then has no projection "
                "between them, but this model has one: take another format"
            )
    return config, {fairseq_name(name, config.conv_norm): value for name, value in state.items()}


def _written_head(
    config: HubertConfig,
    pretrained: bool,
    head: UnitHead | None,
    special_rows: Tensor | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """Codebook and projection, made anew where fairseq wants one that the model has not."""
    random = torch.Generator().manual_seed(0)
    if head is None:
        dim, rows = FINAL_DIM, torch.zeros(0, FINAL_DIM)
        bound = 1 / math.sqrt(config.width)
        weight = torch.empty(dim, config.width).uniform_(-bound, bound, generator=random)
        projection = {"final_proj.weight": weight, "final_proj.bias": torch.zeros(dim)}
        if pretrained:
            notes.append(
                "pretraining head: the source has none, so a projection was drawn and the codebook is empty"
            )
    else:
        rows = head.label_embeddings.detach().cpu()
        dim = rows.shape[1]
        state = head.final_proj.state_dict().items()
        projection = {f"final_proj.{name}": value.detach().cpu() for name, value in state}
        if not pretrained:
            notes.append("projection of the pretraining head: fairseq removes it from fine-tuned models")
        if special_rows is None:
            notes.append(
                f"codebook: four rows for {' '.join(SPECIALS)} were drawn, which fairseq wants in front"
            )
    if special_rows is None or special_rows.shape[1] != dim:
        special_rows = torch.rand(len(SPECIALS), dim, generator=random)
    table = {"label_embs_concat": torch.cat([special_rows, rows])}
    return table | projection if pretrained else table


def _written_settings(config: HubertConfig, final_dim: int, temperature: float) -> dict[str, Any]:
    convs = list(zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True))
    return {name: getattr(config, ours) for ours, name in FIELDS.items()} | {
        "_name": "hubert",
        "extractor_mode": "default" if config.conv_norm == "group" else "layer_norm",
        "conv_feature_layers": str(convs),
        "activation_fn": "gelu",
        "label_rate": config.grid.rate,
        "final_dim": final_dim,
        "logit_temp": temperature,
        "untie_final_proj": True,
    }


def _written_ctc(
    ctc: HubertForCtc, phonemes: PhonemeSet, notes: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The CTC head with fairseq's four special symbols in front, and the symbols of its rows."""
    weight, bias = ctc.lm_head.weight.detach().cpu(), ctc.lm_head.bias.detach().cpu()
    # Who came from fairseq through Hugging Face has <s> and <pad> in each other's place.
    swapped = {BLANK: "<s>", "<s>": "<pad>"} if "<pad>" not in phonemes.symbols else {BLANK: "<s>"}
    names = [swapped.get(symbol, symbol) for symbol in phonemes.symbols]
    made = [name for name in SPECIALS if name not in names]
    weight = torch.cat([weight, weight.new_zeros(len(made), weight.shape[1])])
    bias = torch.cat([bias, bias.new_full((len(made),), NEVER)])
    names += made
    order = [names.index(name) for name in SPECIALS]
    order += [row for row in range(len(names)) if row not in order]
    if made:
        notes.append(f"CTC head: rows for {' '.join(made)} were added, which can never be said")
    if [row for row in order if row < len(phonemes)] != list(range(len(phonemes))):
        notes.append("CTC head: its rows were put in fairseq's order, the blank first")
    return {"w2v_encoder.proj.weight": weight[order], "w2v_encoder.proj.bias": bias[order]}, [
        names[row] for row in order
    ]


class _Dictionary:
    """What fairseq remembers of a dictionary."""

    def __init__(self, symbols: list[str]):
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = SPECIALS
        self.symbols, self.count = list(symbols), [1] * len(symbols)
        self.indices = {symbol: row for row, symbol in enumerate(symbols)}
        self.bos_index, self.pad_index, self.eos_index, self.unk_index = range(len(SPECIALS))
        self.nspecial = len(SPECIALS)


class _Pickler(pickle._Pickler):
    """Names fairseq's class for `_Dictionary`; the usual pickler would import fairseq to look at it."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is not _Dictionary:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        self.write(b"cfairseq.data.dictionary\nDictionary\n")  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


_PICKLE = types.ModuleType("pickle_without_fairseq")
_PICKLE.Pickler = _Pickler  # type: ignore[attr-defined]
