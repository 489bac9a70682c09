"""Reader for HuBERT checkpoints of fairseq and s3prl, and writer for those of fairseq.

Neither package is imported. A checkpoint of fairseq contains settings (`cfg`, or `args` in older files),
weights (`model`) and the dictionaries of its targets (`task_state`). A fine-tuned model (`hubert_ctc`) wraps
the pretrained one and its settings. s3prl keeps the same weights under `model_weight`. Dictionaries begin
with four special symbols, so a codebook of K units has K + 4 rows. The first special symbol, `<s>`, is the
CTC blank.
"""

from __future__ import annotations

import ast
import math
import pickle
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.formats.safe_pickle import to_plain
from jahubert.formats.state_dict import (
    HEAD,
    NORMALIZE_EPS,
    WEIGHT_NORM,
    RawModel,
    config_field,
    count_symbols,
    encoder_shapes,
    fields_from_shapes,
    make_config,
    new_mask_embedding,
    portable_state,
    rename,
    select_tensors,
    symbol_set,
)
from jahubert.formats.typed_fields import typed_item
from jahubert.frames import SAMPLE_RATE
from jahubert.limits import CONVS, limit
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import BLANK, PhonemeSet

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_NEVER = -1e4  # bias of symbols that only fairseq needs; it makes their probabilities exactly zero
_WRAPPED = "w2v_encoder.w2v_model."  # prefix of pretrained tensors in a fine-tuned model
_FINAL_DIM = 256  # output width of a newly initialized projection
_NAMES = [
    (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
    (r"^masked_spec_embed$", "mask_emb"),
    *WEIGHT_NORM,
]
# HubertConfig field -> fairseq setting with the same value.
_FIELDS = {
    "conv_bias": "conv_bias",
    "width": "encoder_embed_dim",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_embed_dim",
    "pre_norm": "layer_norm_first",
    "pos_conv_kernel": "conv_pos",
    "pos_conv_groups": "conv_pos_groups",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "dropout_input",
    "layer_drop": "encoder_layerdrop",
    "conv_grad_scale": "feature_grad_mult",
}
# Pretraining settings -> names of the fine-tuning settings that override them.
_FINE_TUNED = {name: name for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_input")}
_FINE_TUNED |= {"feature_grad_mult": "feature_grad_mult", "encoder_layerdrop": "layerdrop"}
# Settings for which only one value is supported.
_FIXED = {
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
    "activation_fn": "gelu",
}


def fairseq_name(name: str, conv_norm: str = "group") -> str:
    """Convert the name of an encoder tensor to fairseq's name."""
    index = "2" if conv_norm == "group" else "2.1"  # fairseq puts a layer norm between two transpositions
    name = re.sub(r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", rf"\1.{index}.", name)
    return rename(name, _NAMES)


# --- reading ----------------------------------------------------------------------------------------------


def read_fairseq(path: Path, content: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> RawModel:
    """Read a fairseq or s3prl checkpoint.

    Args:
        path: path of the file, for error messages.
        content: content of the unpickled file.
        tensors: weights in the file.
        prefix: prefix of encoder tensor names in `tensors`.

    Raises:
        CheckpointError: the settings or weights are not those of a supported HuBERT model.
    """
    notes: list[str] = []
    model, task = _read_settings(path, content)
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outer = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    config = make_config(
        path, fields_from_shapes(path, inner, fairseq_name), _config_fields(path, model, task)
    )
    codebooks, symbols = _read_dictionaries(path, content)
    head, special_rows = _take_head(path, inner, codebooks, notes)
    if "mask_emb" not in inner:
        inner["mask_emb"] = new_mask_embedding(config.width)
        notes.append("mask embedding: missing in the source, initialized at random")
    if "post_extract_proj.weight" not in inner and config.conv_dims[-1] == config.width:
        # An identity projection is added, because fairseq has no projection between equal widths.
        inner["post_extract_proj.weight"] = torch.eye(config.width)
        inner["post_extract_proj.bias"] = torch.zeros(config.width)
    ctc = {}
    for part in ("weight", "bias"):
        if f"w2v_encoder.proj.{part}" in outer:
            ctc[f"lm_head.{part}"] = outer.pop(f"w2v_encoder.proj.{part}").float()
    weights = select_tensors(
        path, encoder_shapes(config), inner | outer, lambda name: fairseq_name(name, config.conv_norm)
    )
    config, weights = _drop_duplicate_channels(config, weights)
    phonemes = None
    if count_symbols(path, ctc, config.width) is not None:
        ctc, symbols = _drop_unused_specials(ctc, symbols)
        symbols = [BLANK, *symbols[1:]]
        if len(symbols) == len(ctc[HEAD]) and len(set(symbols)) == len(symbols):
            phonemes = symbol_set(path, symbols)
        else:
            notes.append(
                "symbols: omitted, because the number of different symbols in the file "
                f"({len(set(symbols))}) is not the number of CTC outputs ({len(ctc[HEAD])})"
            )
    temperature = typed_item(path, model, "logit_temp", float, 0.1)
    return RawModel(
        config,
        weights | ctc,
        head,
        temperature if temperature > 0 else 0.1,
        special_rows,
        phonemes,
        notes=notes,
    )


def _read_settings(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings of model and task. A fine-tuned model inherits settings of its pretrained model."""
    if "model_weight" in content:
        content = {"cfg": {"model": content.get("model_cfg"), "task": content.get("task_cfg")}}
    settings: Any = to_plain(path, content.get("cfg")) or to_plain(path, content.get("args"))
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: contains fairseq weights, but no settings (cfg or args); use the complete checkpoint"
        )
    # Older files have one flat Namespace with the settings of model and task.
    model: dict[str, Any] = settings
    task: Any = settings
    if isinstance(settings.get("model"), dict):
        model, task = settings["model"], settings.get("task")
    kind = model.get("_name") or model.get("arch") or "hubert"
    if not isinstance(kind, str) or "hubert" not in kind:
        raise CheckpointError(
            f"{path}: the fairseq model is of kind {quote(kind)}, but only HuBERT is supported"
        )
    pretrained_settings = typed_item(path, model, "w2v_args", dict)
    if pretrained_settings is not None:
        changed = {name: model[tuned] for name, tuned in _FINE_TUNED.items() if model.get(tuned) is not None}
        pretrained, _ = _read_settings(path, {"cfg": pretrained_settings})
        model = pretrained | changed
    return model, task if isinstance(task, dict) else {}


def _config_fields(path: Path, model: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Convert fairseq's settings to HubertConfig fields, using fairseq's defaults for missing settings."""
    fixed = dict(_FIXED)
    conv_norm = "layer" if model.get("extractor_mode") == "layer_norm" else "group"
    fixed["extractor_mode"] = "layer_norm" if conv_norm == "layer" else "default"
    for name, value in fixed.items():
        if model.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {quote(model[name])}; only {value!r} is supported")
    fields: dict[str, Any] = {"layer_drop": 0.0, "input_dropout": 0.0, "conv_grad_scale": 1.0}
    for field, name in _FIELDS.items():
        if model.get(name) is not None:
            fields[field] = config_field(path, field, name, model[name])
    fields["conv_norm"] = conv_norm
    if model.get("conv_feature_layers") is not None:
        dims, kernels, strides = zip(*_parse_conv_layers(path, model["conv_feature_layers"]), strict=True)
        fields |= {"conv_dims": dims, "conv_kernels": kernels, "conv_strides": strides}
    fields["normalize"] = typed_item(path, task, "normalize", bool, False)
    return fields | {"normalize_eps": NORMALIZE_EPS}


def _parse_conv_layers(path: Path, text: Any) -> list[tuple[int, int, int]]:
    """Parse a list that fairseq evaluates as Python code, accepting only lists, tuples, integers, + and *."""
    most = limit(CONVS)

    def build(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Tuple):
            return tuple(build(item) for item in node.elts)
        if isinstance(node, ast.List):
            return [build(item) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return build(node.left) + build(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            layers, times = build(node.left), build(node.right)
            if isinstance(layers, list) and isinstance(times, int) and len(layers) * times <= most:
                return layers * times
        raise ValueError

    try:
        if not isinstance(text, str) or len(text) > 10_000:
            raise ValueError
        layers = build(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(layers, list) or not 0 < len(layers) <= most:
            raise ValueError
        for layer in layers:
            if len(layer) != 3 or not all(type(n) is int and 0 < n < 2**31 for n in layer):
                raise ValueError
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise CheckpointError(
            f"{path}: conv_feature_layers is {quote(text)}, which fairseq would run as code. "
            "Nothing was run; use a list of (channels, kernel, stride) instead, such as "
            "'[(512, 10, 5)] + [(512, 3, 2)] * 4'"
        ) from None
    return layers


def _read_dictionaries(path: Path, content: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Read the symbols of each codebook and of the CTC head, or return empty lists if there are none."""
    if "model_weight" in content:
        names = to_plain(path, content.get("dictionaries_symbols"))
        return [symbols for symbols in names if _are_symbols(symbols)] if isinstance(names, list) else [], []
    state = to_plain(path, content.get("task_state"))
    dictionaries: dict[str, list[list[str]]] = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        # The value is a dictionary, a list of them, or (in some versions) a table keyed by label file suffix.
        if isinstance(value, dict) and "symbols" not in value:
            value = list(value.values())
        dictionaries[name] = [
            item["symbols"]
            for item in (value if isinstance(value, list) else [value])
            if isinstance(item, dict) and _are_symbols(item.get("symbols"))
        ]
    codebooks = dictionaries.get("dictionaries") or dictionaries.get("pt_dictionaries") or []
    targets = dictionaries.get("target_dictionary") or dictionaries.get("ft_dictionaries") or [[]]
    return codebooks, targets[0]


def _are_symbols(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(symbol, str) for symbol in value)


def _take_head(
    path: Path, inner: dict[str, Tensor], codebooks: list[list[str]], notes: list[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Remove the pretraining head from `inner`, and return UnitHead's tensors and the special rows.

    The result is ({}, None) if there is no head, or if it is incomplete or not supported.
    """
    table = inner.pop("label_embs", None)  # codebook in the oldest files
    table = inner.pop("label_embs_concat", table)
    weight, bias = (inner.pop(f"final_proj.{part}", None) for part in ("weight", "bias"))
    gate = [inner.pop(name) for name in list(inner) if name.startswith("target_glu.")]
    for name, tensor in (("label_embs_concat", table), ("final_proj.weight", weight)):
        if tensor is not None and (tensor.dim() != 2 or not tensor.numel()):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, but must be a matrix")
    if table is None or weight is None or bias is None:
        if table is not None and len(table) > len(SPECIALS):
            notes.append("codebook: omitted, because the source has no projection for it")
        return {}, None
    if gate or len(codebooks) > 1 or len(weight) != table.shape[1]:
        notes.append("pretraining head: omitted, because several codebooks and gates are not supported")
        return {}, None
    if len(table) <= len(SPECIALS):
        return {}, None
    symbols = codebooks[0][len(SPECIALS) :] if codebooks else []
    order = _unit_order(symbols, len(table) - len(SPECIALS))
    if order != sorted(order):
        notes.append("codebook: rows sorted by unit number")
    rows = table[len(SPECIALS) :].float()[order]
    head = {"final_proj.weight": weight.float(), "final_proj.bias": bias.float(), "label_embeddings": rows}
    return head, table[: len(SPECIALS)].float()


def _unit_order(symbols: list[str], n_units: int) -> list[int]:
    """Return the codebook row of each unit, as dictionaries may be sorted by frequency instead of by unit."""
    rows = {symbol: row for row, symbol in enumerate(symbols)}
    names = [str(unit) for unit in range(n_units)]
    if len(symbols) == n_units and all(name in rows for name in names):
        return [rows[name] for name in names]
    return list(range(n_units))


def _drop_unused_specials(ctc: dict[str, Tensor], symbols: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the special symbols with probability zero that `write_fairseq` adds."""
    weight, bias = ctc[HEAD], ctc.get("lm_head.bias")
    if bias is None or len(symbols) != len(weight) or bias.shape != weight.shape[:1]:
        return ctc, symbols
    keep = []
    for row, symbol in enumerate(symbols):
        unused = symbol in SPECIALS[1:] and float(bias[row]) <= _NEVER and not weight[row].any()
        if not unused:
            keep.append(row)
    return {HEAD: weight[keep], "lm_head.bias": bias[keep]}, [symbols[row] for row in keep]


# --- writing ----------------------------------------------------------------------------------------------


def write_fairseq(
    path: Path,
    model: HubertModel,
    *,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
    special_rows: Tensor | None = None,
) -> list[str]:
    """Write the checkpoint of a pretrained model or, with `ctc`, of a fine-tuned model.

    Returns:
        One message per change to the model.

    Raises:
        CheckpointError: fairseq cannot represent the model, or the symbols of the CTC head are unknown.
    """
    notes: list[str] = []
    config, tensors = _encoder_tensors(model, notes)
    tensors |= _head_tensors(config, ctc is None, unit_head, special_rows, notes)
    codebook = tensors["label_embs_concat"]
    settings = _model_settings(config, codebook.shape[1], 0.1 if unit_head is None else unit_head.temperature)
    task: dict[str, Any] = {
        "_name": "hubert_pretraining",
        "data": "",
        "labels": ["km"],
        "sample_rate": SAMPLE_RATE,
        "label_rate": config.grid.rate,
        "normalize": config.normalize,
        "fine_tuning": False,
    }
    cfg: dict[str, Any] = {"_name": None, "task": task, "model": settings}
    units = [str(unit) for unit in range(len(codebook) - len(SPECIALS))]
    task_state: dict[str, Any] = {"dictionaries": [_Dictionary([*SPECIALS, *units])]}
    if ctc is not None:
        if phonemes is None:
            raise CheckpointError(
                "the model does not name the symbols of its CTC head, which fairseq needs; add them, for "
                "example as vocab.json"
            )
        projection, symbols = _ctc_tensors(ctc, phonemes, notes)
        tensors = {_WRAPPED + name: value for name, value in tensors.items()} | projection
        cfg = _fine_tuned_cfg(cfg)
        task_state["target_dictionary"] = _Dictionary(symbols)
    history = {
        "criterion_name": "",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    content = {
        "args": None,
        "cfg": cfg,
        "model": tensors,
        "task_state": task_state,
        "optimizer_history": [history],
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    with atomic_write(path, "wb") as file:
        torch.save(content, file, pickle_module=_PICKLE)
    return notes


def _encoder_tensors(model: HubertModel, notes: list[str]) -> tuple[HubertConfig, dict[str, Tensor]]:
    """Return the encoder tensors under fairseq's names, and the matching configuration."""
    state = portable_state(model, "fairseq", notes)
    config = replace(model.config, conv_bias="feature_extractor.conv_layers.0.conv.bias" in state)
    if config.conv_dims[-1] == config.width:  # in this case, fairseq has no projection
        weight, bias = (state[f"feature_projection.projection.{part}"] for part in ("weight", "bias"))
        if not bias.any() and weight.equal(torch.eye(config.width)):
            del state["feature_projection.projection.weight"], state["feature_projection.projection.bias"]
        else:
            config, state = _duplicate_channels(config, state)
            notes.append(
                f"front end: as wide as the encoder ({config.width}), for which fairseq has no projection; "
                "its output channels were duplicated, which does not change the result"
            )
    return config, {fairseq_name(name, config.conv_norm): value for name, value in state.items()}


def _duplicated_tensors(config: HubertConfig) -> list[str]:
    """Return the names of the tensors whose rows are output channels of the front end."""
    last = f"feature_extractor.conv_layers.{len(config.conv_dims) - 1}"
    modules = (f"{last}.conv", f"{last}.layer_norm", "feature_projection.layer_norm")
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")]


def _duplicate_channels(
    config: HubertConfig, state: dict[str, Tensor]
) -> tuple[HubertConfig, dict[str, Tensor]]:
    """Make the front end output each channel twice, and the projection ignore the copies.

    The result is the same, because copies change neither the mean nor the variance of a layer norm.
    """
    state = dict(state)
    for name in set(_duplicated_tensors(config)) & set(state):
        state[name] = torch.cat([state[name], state[name]])
    projection = state["feature_projection.projection.weight"]
    state["feature_projection.projection.weight"] = torch.cat([projection, torch.zeros_like(projection)], 1)
    return replace(config, conv_dims=(*config.conv_dims[:-1], 2 * config.conv_dims[-1])), state


def _drop_duplicate_channels(
    config: HubertConfig, state: dict[str, Tensor]
) -> tuple[HubertConfig, dict[str, Tensor]]:
    """Undo `_duplicate_channels`. Models without duplicated channels are returned unchanged."""
    n = config.width
    names = [name for name in _duplicated_tensors(config) if name in state]
    projection = state["feature_projection.projection.weight"]
    if config.conv_dims[-1] != 2 * n or projection[:, n:].any():
        return config, state
    if not all(state[name][:n].equal(state[name][n:]) for name in names):
        return config, state
    narrow = {name: state[name][:n].clone() for name in names}
    narrow["feature_projection.projection.weight"] = projection[:, :n].clone()
    return replace(config, conv_dims=(*config.conv_dims[:-1], n)), state | narrow


def _head_tensors(
    config: HubertConfig,
    pretrained: bool,
    head: UnitHead | None,
    special_rows: Tensor | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """Return the codebook and, if `pretrained`, the projection, initializing tensors that the model lacks."""
    random = torch.Generator().manual_seed(0)
    if head is None:
        dim, rows = _FINAL_DIM, torch.zeros(0, _FINAL_DIM)
        bound = 1 / math.sqrt(config.width)
        weight = torch.empty(dim, config.width).uniform_(-bound, bound, generator=random)
        projection = {"final_proj.weight": weight, "final_proj.bias": torch.zeros(dim)}
        if pretrained:
            notes.append(
                "pretraining head: missing in the source; the projection is random and the codebook is empty"
            )
    else:
        rows = head.label_embeddings.detach().cpu()
        dim = rows.shape[1]
        state = head.final_proj.state_dict().items()
        projection = {f"final_proj.{name}": value.detach().cpu() for name, value in state}
        if not pretrained:
            notes.append("projection of the pretraining head: dropped, as in fairseq's fine-tuned models")
        if special_rows is None:
            specials = " ".join(SPECIALS)
            notes.append(f"codebook: rows for {specials}, which fairseq requires, initialized at random")
    if special_rows is None or special_rows.shape[1] != dim:
        special_rows = torch.rand(len(SPECIALS), dim, generator=random)
    table = {"label_embs_concat": torch.cat([special_rows, rows])}
    return table | projection if pretrained else table


def _model_settings(config: HubertConfig, final_dim: int, temperature: float) -> dict[str, Any]:
    convs = list(zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True))
    return {name: getattr(config, field) for field, name in _FIELDS.items()} | {
        "_name": "hubert",
        "extractor_mode": "default" if config.conv_norm == "group" else "layer_norm",
        "conv_feature_layers": str(convs),
        "activation_fn": "gelu",
        "label_rate": config.grid.rate,
        "final_dim": final_dim,
        "logit_temp": temperature,
        "untie_final_proj": True,
    }


def _fine_tuned_cfg(pretrained: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for a CTC model that wraps a pretrained model."""
    settings, task = pretrained["model"], pretrained["task"]
    model = {tuned: settings[name] for name, tuned in _FINE_TUNED.items()}
    model |= {"_name": "hubert_ctc", "w2v_path": "", "w2v_args": pretrained, "final_dropout": 0.0, "data": ""}
    model["normalize"] = task["normalize"]
    task = task | {"fine_tuning": True, "labels": ["ltr"], "label_rate": -1, "single_target": True}
    return {"_name": None, "task": task, "model": model}


def _ctc_tensors(
    ctc: HubertForCtc, phonemes: PhonemeSet, notes: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the CTC head with fairseq's four special symbols first, and the symbol of each row."""
    weight, bias = ctc.lm_head.weight.detach().cpu(), ctc.lm_head.bias.detach().cpu()
    # In models converted from fairseq through Hugging Face's format, <s> and <pad> are swapped.
    swapped = {BLANK: "<s>"} if "<pad>" in phonemes.symbols else {BLANK: "<s>", "<s>": "<pad>"}
    names = [swapped.get(symbol, symbol) for symbol in phonemes.symbols]
    added = [name for name in SPECIALS if name not in names]
    weight = torch.cat([weight, weight.new_zeros(len(added), weight.shape[1])])
    bias = torch.cat([bias, bias.new_full((len(added),), _NEVER)])
    names += added
    order = [names.index(name) for name in SPECIALS]
    order += [row for row in range(len(names)) if row not in order]
    if added:
        notes.append(f"CTC head: rows for {' '.join(added)} were added with probability zero")
    if [row for row in order if row < len(phonemes)] != list(range(len(phonemes))):
        notes.append("CTC head: rows reordered for fairseq, with the blank first")
    tensors = {"w2v_encoder.proj.weight": weight[order], "w2v_encoder.proj.bias": bias[order]}
    return tensors, [names[row] for row in order]


class _Dictionary:
    """Replacement for fairseq's Dictionary with the same attributes."""

    def __init__(self, symbols: list[str]):
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = SPECIALS
        self.symbols, self.count = list(symbols), [1] * len(symbols)
        self.indices = {symbol: row for row, symbol in enumerate(symbols)}
        self.bos_index, self.pad_index, self.eos_index, self.unk_index = range(len(SPECIALS))
        self.nspecial = len(SPECIALS)


class _Pickler(pickle._Pickler):
    """Pickler that saves `_Dictionary` as fairseq's class without importing fairseq."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is not _Dictionary:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        self.write(b"cfairseq.data.dictionary\nDictionary\n")  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


_PICKLE = types.ModuleType("pickle_without_fairseq")
_PICKLE.Pickler = _Pickler  # type: ignore[attr-defined]
