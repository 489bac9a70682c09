"""Reader and writer for torchaudio HuBERT state dicts.

torchaudio stores the settings of models in code and not in files. The writer therefore adds a JSON file that
contains the call that builds the model. The names of the two files differ only in the suffix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError
from jahubert.formats.atomic import atomic_write
from jahubert.formats.model_files import settings_file
from jahubert.formats.state_dict import (
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
from jahubert.formats.typed_fields import read_json, typed, typed_item
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

_NAMES = [
    (r"^feature_projection\.", "encoder.feature_projection."),
    (r"^encoder\.(pos_conv_embed|layer_norm|layers)\b", r"encoder.transformer.\1"),
    *WEIGHT_NORM,
]
# HubertConfig field -> argument of torchaudio's model functions.
_ARGUMENTS = {
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
_CONVS = "extractor_conv_layer_config"
_MODES = {"group": "group_norm", "layer": "layer_norm"}
# Additional arguments of hubert_pretrain_model, with the values in the paper.
_PRETRAINING: dict[str, Any] = {
    "mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10,
    "no_mask_overlap": False, "mask_min_space": 1, "mask_channel_prob": 0.0,
    "mask_channel_selection": "static", "mask_channel_other": 0.0, "mask_channel_length": 10,
    "no_mask_channel_overlap": False, "mask_channel_min_space": 1, "skip_masked": False, "skip_nomask": False,
}  # fmt: skip
# Width -> number of attention heads (large, xlarge). Heads of other models are assumed to have a width of 64.
_PUBLISHED_HEADS = {1024: 16, 1280: 16}


def torchaudio_name(name: str) -> str:
    """Convert an encoder tensor name to torchaudio's name. torchaudio has no name for the mask embedding."""
    return rename(name, _NAMES)


# --- reading ----------------------------------------------------------------------------------------------


def read_torchaudio(path: Path, tensors: dict[str, Tensor], prefix: str) -> RawModel:
    """Read a state dict of wav2vec2_model or hubert_pretrain_model, including Lightning checkpoints.

    Args:
        path: path of the file. Its settings may be in a JSON file next to it.
        tensors: weights in the file.
        prefix: prefix of encoder tensor names in `tensors`.

    Raises:
        CheckpointError: the settings or weights are not those of a supported HuBERT model.
    """
    notes: list[str] = []
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outer_prefix = prefix.removesuffix("wav2vec2.")
    outer = {
        name.removeprefix(outer_prefix).removeprefix("model."): value
        for name, value in tensors.items()
        if not name.startswith(prefix)
    }
    config, labels = _read_config(path, inner, notes)
    ctc, head = {}, {}
    for part in ("weight", "bias"):
        output = inner.pop(f"aux.{part}", outer.pop(f"aux.{part}", None))
        if output is not None:
            ctc[f"lm_head.{part}"] = output.float()
        if f"logit_generator.final_proj.{part}" in outer:
            head[f"final_proj.{part}"] = outer.pop(f"logit_generator.final_proj.{part}").float()
    if "logit_generator.label_embeddings" in outer:
        head["label_embeddings"] = outer.pop("logit_generator.label_embeddings").float()
    if len(head) not in (0, 3):
        notes.append(f"pretraining head: omitted, because the source has only {', '.join(head)}")
        head = {}
    mask = outer.pop("mask_generator.mask_embedding", None)
    if mask is None:
        mask = new_mask_embedding(config.width)
        notes.append("mask embedding: missing in the source, initialized at random")
    shapes = encoder_shapes(config)
    del shapes["masked_spec_embed"]
    weights = select_tensors(path, shapes, inner | outer, torchaudio_name)
    weights["masked_spec_embed"] = mask.float()
    n_symbols = count_symbols(path, ctc, config.width)
    phonemes = None
    if n_symbols is not None and n_symbols == len(labels):
        phonemes = symbol_set(settings_file(path), labels)
    elif n_symbols is not None:
        notes.append(
            f"symbols: omitted, because their number in the source ({len(labels)}) is not the number of CTC "
            f"outputs ({n_symbols})"
        )
    return RawModel(config, weights | ctc, head, phonemes=phonemes, notes=notes)


def _read_config(path: Path, inner: dict[str, Tensor], notes: list[str]) -> tuple[HubertConfig, list[Any]]:
    """Determine the configuration and CTC symbols from shapes and from the JSON file next to `path`.

    Without the JSON file, strides as in the published models and attention heads of width 64 (xlarge: 80) are
    assumed, and a model with layer norms in the front end is assumed to be a pre-norm model with normalized
    waveforms, as in torchaudio's own models.
    """
    from_shapes = fields_from_shapes(path, inner, torchaudio_name)
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in inner
    fields: dict[str, Any] = {
        "conv_norm": "layer" if layer_norms else "group",
        "normalize_eps": NORMALIZE_EPS,
    }
    settings_path = settings_file(path)
    if settings_path.is_file():
        settings = read_json(settings_path)
        fields |= _settings_fields(settings_path, settings)
        labels = typed_item(settings_path, settings, "labels", list, [])
        return make_config(path, from_shapes, fields), labels
    if from_shapes["conv_kernels"] != HubertConfig().conv_kernels:
        raise CheckpointError(
            f"{path}: the front end is not standard, and its strides are unknown; specify them in "
            f"{settings_path.name} next to this file (see docs/formats.md)"
        )
    heads = _PUBLISHED_HEADS.get(from_shapes["width"], max(1, from_shapes["width"] // 64))
    fields |= {"heads": heads, "pre_norm": layer_norms, "normalize": layer_norms}
    notes.append(
        f"settings: the file has none, so heads={heads} and normalize={layer_norms} were assumed, as in "
        "torchaudio's own models"
    )
    return make_config(path, from_shapes, fields), []


def _settings_fields(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Convert the settings in the JSON file to HubertConfig fields."""
    arguments = typed(path, "arguments", settings.get("arguments"), dict)
    fields = {
        field: config_field(path, field, name, arguments.get(name)) for field, name in _ARGUMENTS.items()
    }
    convs = [typed(path, _CONVS, conv, tuple) for conv in typed(path, _CONVS, arguments.get(_CONVS), list)]
    if any(len(conv) != 3 for conv in convs):
        raise CheckpointError(f"{path}: {_CONVS} must be a list of [channels, kernel, stride]")
    fields["conv_strides"] = tuple(stride for _, _, stride in convs)
    fields["conv_grad_scale"] = typed(path, "feature_grad_mult", settings.get("feature_grad_mult"), float)
    fields["normalize"] = typed(path, "normalize", settings.get("normalize"), bool)
    return fields


# --- writing ----------------------------------------------------------------------------------------------


def write_torchaudio(
    path: Path,
    model: HubertModel,
    *,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
) -> list[str]:
    """Write a state dict, and a JSON file with the call that builds the model.

    Returns:
        One message per change to the model.

    Raises:
        CheckpointError: torchaudio cannot represent the model.
    """
    notes: list[str] = []
    state = portable_state(model, "torchaudio", notes)
    config, mask = model.config, state.pop("masked_spec_embed")
    arguments = {name: getattr(config, field) for field, name in _ARGUMENTS.items()}
    arguments["extractor_mode"] = _MODES[config.conv_norm]
    arguments["extractor_conv_bias"] = "feature_extractor.conv_layers.0.conv.bias" in state
    convs = zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True)
    arguments[_CONVS] = [list(conv) for conv in convs]
    tensors = {torchaudio_name(name): value for name, value in state.items()}
    settings: dict[str, Any] = {"normalize": config.normalize, "feature_grad_mult": config.conv_grad_scale}
    if ctc is None and unit_head is not None:
        factory = "hubert_pretrain_model"
        head = {name: value.detach().cpu() for name, value in unit_head.state_dict().items()}
        tensors = {f"wav2vec2.{name}": value for name, value in tensors.items()}
        tensors |= {f"logit_generator.{name}": value for name, value in head.items()}
        tensors["mask_generator.mask_embedding"] = mask
        n_units, dim = head["label_embeddings"].shape
        arguments |= _PRETRAINING | {"num_classes": n_units, "final_dim": dim}
        arguments["feature_grad_mult"] = config.conv_grad_scale
    else:
        factory = "wav2vec2_model"
        notes.append("mask embedding: dropped, because torchaudio has it only in pretraining models")
        if unit_head is not None:
            notes.append("pretraining head: dropped, because torchaudio has no model with both heads")
        arguments["aux_num_out"] = None if ctc is None else ctc.lm_head.out_features
        if ctc is not None:
            output = ctc.lm_head.state_dict()
            tensors |= {f"aux.{name}": value.detach().cpu() for name, value in output.items()}
            settings["labels"] = None if phonemes is None else list(phonemes.symbols)
    call = {"factory": f"torchaudio.models.{factory}", "arguments": arguments, **settings}
    with atomic_write(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        # The settings are complete before the weights get their final name.
        with atomic_write(settings_file(path)) as text:
            json.dump(call, text, indent=2, ensure_ascii=False)
            text.write("\n")
    return notes
