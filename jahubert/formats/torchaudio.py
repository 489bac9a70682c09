"""Models of other projects: which one a file is of, torchaudio's layout, and Hugging Face's vocabularies.

fairseq's layout is in `fairseq_model`, names and checks that all share are in `layouts`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, DataError
from jahubert.formats.fairseq import read_fairseq
from jahubert.formats.state_dict import (
    NORMALIZE_EPS,
    RawModel,
    encoder_shapes,
    fields_from_shapes,
    load_tensors,
    make_config,
    new_mask_embedding,
    portable_state,
    read_tensors,
    select_tensors,
    torchaudio_name,
    weight_norm_name,
)
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import BLANK, BOUNDARY, PhonemeSet

# Our field -> the argument of torchaudio's model factories.
_TORCHAUDIO_FIELDS = {
    "conv_bias": "extractor_conv_bias",
    "width": "encoder_embed_dim",
    "layers": "encoder_num_layers",
    "heads": "encoder_num_heads",
    "ffn": "encoder_ff_interm_features",
    "pre_norm": "encoder_layer_norm_first",
    "pos_conv_kernel": "encoder_pos_conv_kernel",
    "pos_conv_groups": "encoder_pos_conv_groups",
    "dropout": "encoder_dropout",
    "attention_dropout": "encoder_attention_dropout",
    "activation_dropout": "encoder_ff_interm_dropout",
    "input_dropout": "encoder_projection_dropout",
    "layer_drop": "encoder_layer_drop",
}
_MODES = {"group": "group_norm", "layer": "layer_norm"}
# What hubert_pretrain_model wants to know besides; the values of the paper.
_PRETRAINING: dict[str, Any] = {
    "mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10,
    "no_mask_overlap": False, "mask_min_space": 1, "mask_channel_prob": 0.0,
    "mask_channel_selection": "static", "mask_channel_other": 0.0, "mask_channel_length": 10,
    "no_mask_channel_overlap": False, "mask_channel_min_space": 1, "skip_masked": False, "skip_nomask": False,
}  # fmt: skip
_PUBLISHED_HEADS = {1024: 16, 1280: 16}  # width -> heads of large and xlarge; base and most others: 64 wide


def read_file(path: Path) -> RawModel:
    """Read a fairseq, s3prl or torchaudio file.

    A bare torchaudio state dict does not say all; see `_torchaudio_fields` for what is taken then.

    Raises:
        CheckpointError: it is none of them, damaged, hostile, or no HuBERT.
    """
    content = read_tensors(path)
    inside = next(
        (content[key] for key in ("model_weight", "model", "state_dict") if key in content), content
    )
    tensors = {weight_norm_name(name): value for name, value in load_tensors(inside).items()}
    front = re.compile(r"(.*?)feature_extractor\.conv_layers\.0\.")
    starts = {match[1] for name in tensors if (match := front.match(name))}
    if len(starts) != 1:
        raise CheckpointError(
            f"{path}: {len(tensors)} tensors with {len(starts) or 'no'} HuBERT front ends among them, so "
            "this is no HuBERT; give a fairseq, s3prl or torchaudio file, or a Hugging Face folder"
        )
    (prefix,) = starts
    if f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in tensors:
        parts = read_fairseq(path, content, tensors, prefix)
        layout = "s3prl" if "model_weight" in content else "fairseq"
    elif f"{prefix}encoder.transformer.layers.0.attention.q_proj.weight" in tensors:
        parts, layout = _read_torchaudio(path, tensors, prefix), "torchaudio"
    else:
        raise CheckpointError(
            f"{path}: neither fairseq's nor torchaudio's names; weights in Hugging Face's need the "
            "config.json beside them: give the folder"
        )
    parts.info = {"origin": {"file": path.name, "layout": layout}}
    return parts


def _read_torchaudio(path: Path, tensors: dict[str, Tensor], prefix: str) -> RawModel:
    """The state of wav2vec2_model, perhaps with `aux`, or hubert_pretrain_model, bare or from Lightning."""
    notes: list[str] = []
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outer = prefix.removesuffix("wav2vec2.")
    others = {
        name.removeprefix(outer): value for name, value in tensors.items() if not name.startswith(prefix)
    }
    others = {name.removeprefix("model."): value for name, value in others.items()}
    config, labels = _torchaudio_fields(path, inner, notes)
    ctc, head = {}, {}
    for part in ("weight", "bias"):
        found = inner.pop(f"aux.{part}", others.pop(f"aux.{part}", None))
        if found is not None:
            ctc[f"lm_head.{part}"] = found.float()
        if f"logit_generator.final_proj.{part}" in others:
            head[f"final_proj.{part}"] = others.pop(f"logit_generator.final_proj.{part}").float()
    if "logit_generator.label_embeddings" in others:
        head["label_embeddings"] = others.pop("logit_generator.label_embeddings").float()
    if len(head) not in (0, 3):
        notes.append(f"pretraining head: only {', '.join(head)} of it is in the source, so it was left out")
        head = {}
    mask = others.pop("mask_generator.mask_embedding", None)
    if mask is None:
        mask = new_mask_embedding(config.width)
        notes.append("mask embedding: the source has none, so a new one was drawn")
    shapes = encoder_shapes(config)
    del shapes["masked_spec_embed"]
    weights = (
        select_tensors(path, shapes, inner | others, torchaudio_name)
        | {"masked_spec_embed": mask.float()}
        | ctc
    )
    phonemes = None
    if ctc and len(labels) == len(ctc["lm_head.weight"]):
        phonemes = symbol_set(path.with_suffix(".json"), {"symbols": labels})
    elif ctc:
        notes.append("symbols: torchaudio's files do not name those of the CTC head")
    return RawModel(config, weights, head, phonemes=phonemes, notes=notes)


def _torchaudio_fields(
    path: Path, inner: dict[str, Tensor], notes: list[str]
) -> tuple[HubertConfig, list[str]]:
    """The config and the symbols of the CTC head: from the shapes, and the JSON file that we write beside it.

    Without that file a model has the strides of the published ones and 64 channels a head (xlarge 80);
    pre-norm and normalised waveforms go with layer norms in the front end, as in torchaudio's own models.
    """
    shown = fields_from_shapes(path, inner, torchaudio_name)
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in inner
    fields: dict[str, Any] = {
        "conv_norm": "layer" if layer_norms else "group",
        "normalize_eps": NORMALIZE_EPS,
    }
    beside, labels = path.with_suffix(".json"), []
    if beside.is_file():
        settings = read_json(beside)
        try:
            arguments = settings["arguments"]
            fields |= {ours: arguments[name] for ours, name in _TORCHAUDIO_FIELDS.items()}
            fields["conv_strides"] = tuple(conv[2] for conv in arguments["extractor_conv_layer_config"])
            fields["conv_grad_scale"] = settings["feature_grad_mult"]
            fields["normalize"], labels = bool(settings["normalize"]), settings.get("labels") or []
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{beside}: not the settings of {path.name}, {error} is missing or of another kind; mend it "
                "as docs/formats.md describes, or take it away"
            ) from error
    else:
        heads = _PUBLISHED_HEADS.get(shown["width"], max(1, shown["width"] // 64))
        fields |= {"heads": heads, "pre_norm": layer_norms, "normalize": layer_norms}
        if shown["conv_kernels"] != HubertConfig().conv_kernels:
            raise CheckpointError(
                f"{path}: the strides of its unusual front end stand nowhere; put them into {beside.name} "
                "beside it, as docs/formats.md describes"
            )
        notes.append(
            f"settings: a bare state dict has none; {heads} heads, waveforms "
            f"{'normalised' if layer_norms else 'as they are'}, as in torchaudio's own models"
        )
    return make_config(path, shown, fields), labels


def write_torchaudio(
    path: Path,
    model: HubertModel,
    *,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
) -> list[str]:
    """Write a state dict for torchaudio and beside it, as JSON, the call that makes the model for it.

    Returns:
        What was dropped or made anew, a sentence each.

    Raises:
        CheckpointError: torchaudio has no such model.
    """
    notes: list[str] = []
    state = portable_state(model, "torchaudio", notes)
    config, mask = model.config, state.pop("masked_spec_embed")
    arguments = {name: getattr(config, ours) for ours, name in _TORCHAUDIO_FIELDS.items()}
    arguments["extractor_mode"] = _MODES[config.conv_norm]
    arguments["extractor_conv_bias"] = "feature_extractor.conv_layers.0.conv.bias" in state
    convs = zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True)
    arguments["extractor_conv_layer_config"] = [list(conv) for conv in convs]
    tensors = {torchaudio_name(name): value for name, value in state.items()}
    settings: dict[str, Any] = {"normalize": config.normalize, "feature_grad_mult": config.conv_grad_scale}
    if ctc is None and unit_head is not None:
        head = {name: value.detach().cpu() for name, value in unit_head.state_dict().items()}
        tensors = {f"wav2vec2.{name}": value for name, value in tensors.items()}
        tensors |= {f"logit_generator.{name}": value for name, value in head.items()}
        tensors["mask_generator.mask_embedding"] = mask
        n_units, dim = head["label_embeddings"].shape
        arguments |= _PRETRAINING | {"num_classes": n_units, "final_dim": dim}
        arguments["feature_grad_mult"] = config.conv_grad_scale
    else:
        notes.append("mask embedding: torchaudio has it in pretraining models only, so it was dropped")
        if unit_head is not None:
            notes.append(
                "pretraining head: torchaudio has no model with it and a CTC head, so it was dropped"
            )
        arguments["aux_num_out"] = None if ctc is None else ctc.lm_head.out_features
        if ctc is not None:
            tensors |= {
                f"aux.{name}": value.detach().cpu() for name, value in ctc.lm_head.state_dict().items()
            }
            settings["labels"] = None if phonemes is None else list(phonemes.symbols)
    factory = "hubert_pretrain_model" if "num_classes" in arguments else "wav2vec2_model"
    torch.save(tensors, path)
    text = json.dumps(
        {"factory": f"torchaudio.models.{factory}", "arguments": arguments, **settings},
        indent=2,
        ensure_ascii=False,
    )
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return notes


def hf_symbols(folder: Path, hf: dict, n_rows: int) -> PhonemeSet | None:
    """The symbols of a Hugging Face CTC head, by row; None where the folder has no vocabulary.

    Blank is the row `pad_token_id` of config.json, whatever it is called, and the word delimiter is the one
    of tokenizer_config.json. Rows that the vocabulary does not name get their number for a name.
    """
    if not (folder / "vocab.json").is_file():
        return None
    vocabulary = {**_optional(folder / "vocab.json"), **_optional(folder / "added_tokens.json")}
    names = {row: name for name, row in vocabulary.items() if type(row) is int and 0 <= row < n_rows}
    symbols = [names.get(row, f"<{row}>") for row in range(n_rows)]
    blank = hf.get("pad_token_id")
    blank = blank if isinstance(blank, int) else 0
    if not 0 <= blank < n_rows:
        raise CheckpointError(
            f"{folder}/config.json: pad_token_id, the CTC blank, is {blank}, but the head has {n_rows} "
            "outputs; set it to the one the model was trained with"
        )
    delimiter = _optional(folder / "tokenizer_config.json").get("word_delimiter_token", BOUNDARY)
    if delimiter in symbols and BOUNDARY not in symbols:
        symbols[symbols.index(delimiter)] = BOUNDARY
    symbols[blank] = BLANK
    return symbol_set(folder / "vocab.json", {"symbols": symbols})


def hf_vocabulary(phonemes: PhonemeSet) -> dict[str, int]:
    """vocab.json for a set of symbols: the blank is called `<pad>` there."""
    # A model from fairseq has both: its blank is <s>, and <pad> is another symbol.
    names = {BLANK: "<pad>"} | ({"<pad>": "<s>"} if "<s>" not in phonemes.symbols else {"<pad>": "<pad >"})
    return {names.get(symbol, symbol): row for row, symbol in enumerate(phonemes.symbols)}


def symbol_set(where: object, data: Any) -> PhonemeSet:
    """PhonemeSet from `{"symbols": [...]}`, or a CheckpointError that says where wrong ones stand."""
    try:
        return PhonemeSet.from_json(data)
    except DataError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_json(path: Path) -> dict:
    """A JSON object. CheckpointError: it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model folder, {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _optional(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
