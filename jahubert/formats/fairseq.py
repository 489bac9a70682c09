"""fairseq's HuBERT checkpoints, read without fairseq.

A checkpoint holds settings (`cfg`, or `args` in older files), the weights (`model`) and the dictionaries of
its targets (`task_state`). A fine-tuned model (`hubert_ctc`) wraps the pretrained one, settings and weights.
s3prl keeps the same weights under `model_weight`. Dictionaries begin with four special symbols, so a codebook
of K units has K + 4 rows there; the first special symbol, `<s>`, is the CTC blank.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError
from jahubert.formats.safe_pickle import to_plain
from jahubert.formats.state_dict import (
    NORMALIZE_EPS,
    RawModel,
    encoder_shapes,
    fairseq_name,
    fields_from_shapes,
    make_config,
    new_mask_embedding,
    select_tensors,
)
from jahubert.phonemes import BLANK, PhonemeSet

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
NEVER = -1e4  # bias of a symbol that is there only because fairseq wants it: its probability is exactly zero
WRAPPED = "w2v_encoder.w2v_model."  # the pretrained model inside a fine-tuned one
MAX_CONVS = 64
# Our field -> fairseq's setting, for the fields that only change their name.
FIELDS = {
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
# What fine-tuning sets anew, by the name it has there.
FINE_TUNED = {name: name for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_input")}
FINE_TUNED |= {"feature_grad_mult": "feature_grad_mult", "encoder_layerdrop": "layerdrop"}


def read_fairseq(path: Path, content: dict, tensors: dict[str, Tensor], prefix: str) -> RawModel:
    """The parts of a fairseq or s3prl checkpoint; `prefix` stands before the encoder's names in `tensors`.

    Raises:
        CheckpointError: its settings or weights are not those of a HuBERT.
    """
    notes: list[str] = []
    model, task = _settings(path, content)
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outside = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    config = make_config(path, fields_from_shapes(path, inner, fairseq_name), _fields(path, model, task))
    codebooks, symbols = _dictionaries(content)
    ctc = {
        f"lm_head.{part}": outside.pop(f"w2v_encoder.proj.{part}").float()
        for part in ("weight", "bias")
        if f"w2v_encoder.proj.{part}" in outside
    }
    head, special_rows = _take_head(inner, codebooks, notes)
    if "mask_emb" not in inner:
        inner["mask_emb"] = new_mask_embedding(config.width)
        notes.append("mask embedding: the source has none, so a new one was drawn")
    if "post_extract_proj.weight" not in inner and config.conv_dims[-1] == config.width:
        # fairseq has none between equal widths; this one changes nothing.
        inner["post_extract_proj.weight"] = torch.eye(config.width)
        inner["post_extract_proj.bias"] = torch.zeros(config.width)
    weights = select_tensors(
        path, encoder_shapes(config), inner | outside, lambda name: fairseq_name(name, config.conv_norm)
    )
    phonemes = None
    if ctc:
        ctc, symbols = _without_never(ctc, symbols)
        if len(symbols) == len(ctc["lm_head.weight"]) and len({BLANK, *symbols[1:]}) == len(symbols):
            phonemes = PhonemeSet((BLANK, *symbols[1:]))
        else:
            notes.append(
                f"symbols: the file names {len(symbols)}, but its CTC head has {len(ctc['lm_head.weight'])}"
            )
    temperature = model.get("logit_temp")
    temperature = temperature if isinstance(temperature, int | float) and temperature > 0 else 0.1
    return RawModel(config, weights | ctc, head, temperature, special_rows, phonemes, notes=notes)


def _settings(path: Path, content: dict) -> tuple[dict, dict]:
    """Settings of model and task; those of the pretrained model where a fine-tuned one wraps it."""
    if "model_weight" in content:
        content = {"cfg": {"model": content.get("model_cfg"), "task": content.get("task_cfg")}}
    found = to_plain(content.get("cfg")) or to_plain(content.get("args"))
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: fairseq weights without settings (cfg or args); take the whole checkpoint"
        )
    nested = isinstance(found.get("model"), dict)  # an old Namespace is one flat table for everything
    model, task = (found["model"], found.get("task")) if nested else (found, found)
    kind = str(model.get("_name") or model.get("arch") or "hubert")
    if "hubert" not in kind:
        raise CheckpointError(f"{path}: a fairseq model of kind {kind!r}, but only HuBERT can be opened")
    if isinstance(model.get("w2v_args"), dict):
        changed = {name: model[there] for name, there in FINE_TUNED.items() if model.get(there) is not None}
        model = _settings(path, {"cfg": model["w2v_args"]})[0] | changed
    return model, task if isinstance(task, dict) else {}


def _fields(path: Path, model: dict, task: dict) -> dict[str, Any]:
    """HubertConfig's fields from fairseq's settings; what they do not say has fairseq's defaults."""
    only = {
        "layer_type": "transformer",
        "pos_conv_depth": 1,
        "conv_pos_batch_norm": False,
        "activation_fn": "gelu",
    }
    only["extractor_mode"] = "layer_norm" if model.get("extractor_mode") == "layer_norm" else "default"
    for name, value in only.items():
        if model.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {model[name]!r}; only {value!r} is supported")
    fields: dict[str, Any] = {"layer_drop": 0.0, "input_dropout": 0.0, "conv_grad_scale": 1.0}
    fields |= {ours: model[name] for ours, name in FIELDS.items() if model.get(name) is not None}
    fields["conv_norm"] = "layer" if only["extractor_mode"] == "layer_norm" else "group"
    if model.get("conv_feature_layers") is not None:
        dims, kernels, strides = zip(*_conv_layers(path, model["conv_feature_layers"]), strict=True)
        fields |= {"conv_dims": dims, "conv_kernels": kernels, "conv_strides": strides}
    return fields | {"normalize": bool(task.get("normalize", False)), "normalize_eps": NORMALIZE_EPS}


def _conv_layers(path: Path, text: Any) -> list[tuple[int, int, int]]:
    """The list that fairseq gets by running the text as a program; here only lists, `+` and `*` are known."""

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
            if isinstance(layers, list) and isinstance(times, int) and times <= MAX_CONVS:
                return layers * times
        raise ValueError

    try:
        found = build(ast.parse(str(text).strip(), mode="eval").body)
        if not isinstance(found, list) or not 0 < len(found) <= MAX_CONVS:
            raise ValueError
        if any(len(layer) != 3 or not all(type(n) is int and n > 0 for n in layer) for layer in found):
            raise ValueError
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise CheckpointError(
            f"{path}: conv_feature_layers is {str(text)[:80]!r}, which fairseq would run as a program. "
            "Nothing was run here: it must be a list of (channels, kernel, stride), such as "
            "'[(512, 10, 5)] + [(512, 3, 2)] * 4'"
        ) from None
    return found


def _dictionaries(content: dict) -> tuple[list[list[str]], list[str]]:
    """Symbols of each codebook, and of the CTC head, as far as the file knows them."""
    if "model_weight" in content:
        named = to_plain(content.get("dictionaries_symbols"))
        return [symbols for symbols in named if _are_symbols(symbols)] if isinstance(named, list) else [], []
    state = to_plain(content.get("task_state"))
    found: dict[str, list[list[str]]] = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        # One dictionary, a list of them, or in some versions a table by the ending of the label files.
        if isinstance(value, dict) and "symbols" not in value:
            value = list(value.values())
        several = value if isinstance(value, list) else [value]
        found[name] = [
            one["symbols"] for one in several if isinstance(one, dict) and _are_symbols(one.get("symbols"))
        ]
    targets = found.get("target_dictionary") or found.get("ft_dictionaries") or [[]]
    return found.get("dictionaries") or found.get("pt_dictionaries") or [], targets[0]


def _are_symbols(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(symbol, str) for symbol in found)


def _take_head(
    inner: dict[str, Tensor], codebooks: list[list[str]], notes: list[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Remove the pretraining head from `inner`; UnitHead's tensors, and the rows of the special symbols."""
    table = inner.pop("label_embs", None)  # its name in the oldest files
    table = inner.pop("label_embs_concat", table)
    projection = {part: inner.pop(f"final_proj.{part}", None) for part in ("weight", "bias")}
    glu = [inner.pop(name) for name in list(inner) if name.startswith("target_glu.")]
    weight, bias = projection["weight"], projection["bias"]
    if table is None or weight is None or bias is None:
        if table is not None and len(table) > len(SPECIALS):
            notes.append("codebook: its projection is not in the source, so it was left out")
        return {}, None
    if glu or len(codebooks) > 1 or len(weight) != table.shape[1]:
        notes.append("pretraining head: it has several codebooks or a gate, which UnitHead has not; left out")
        return {}, None
    if len(table) <= len(SPECIALS):
        return {}, None
    symbols = codebooks[0][len(SPECIALS) :] if codebooks else []
    order = _unit_order(symbols, len(table) - len(SPECIALS))
    if order != sorted(order):
        notes.append("codebook: its rows were put in the order of the units' numbers")
    rows = table[len(SPECIALS) :].float()[order]
    head = {"final_proj.weight": weight.float(), "final_proj.bias": bias.float(), "label_embeddings": rows}
    return head, table[: len(SPECIALS)].float()


def _unit_order(symbols: list[str], n_units: int) -> list[int]:
    """For each unit the row that is its own: lines of a dictionary may be sorted by frequency."""
    place = {symbol: row for row, symbol in enumerate(symbols)}
    names = [str(unit) for unit in range(n_units)]
    known = len(symbols) == n_units and all(name in place for name in names)
    return [place[name] for name in names] if known else list(range(n_units))


def _without_never(ctc: dict[str, Tensor], symbols: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Drop special symbols that can never be said: they were added for fairseq by `write_fairseq`."""
    weight, bias = ctc["lm_head.weight"], ctc.get("lm_head.bias")
    if bias is None or len(symbols) != len(weight) or len(bias) != len(weight):
        return ctc, symbols
    idle = [
        s in SPECIALS[1:] and float(b) <= NEVER and not w.any()
        for s, w, b in zip(symbols, weight, bias, strict=True)
    ]
    keep = [row for row, never in enumerate(idle) if not never]
    kept = {"lm_head.weight": weight[keep], "lm_head.bias": bias[keep]}
    return kept, [symbols[row] for row in keep]
