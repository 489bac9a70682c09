"""Bundles: a model folder that explains itself and that Hugging Face `transformers` opens as it is.

    config.json  model.safetensors  preprocessor_config.json     Hugging Face's layout
    vocab.json                                                  CTC models: symbol -> index
    jahubert.json                                               format, phoneme set, unit layer, origin
    centroids.safetensors  pretraining_heads.safetensors        where they exist
    README.md                                                   a model card

A Hugging Face HuBERT folder without our extra files opens as well, and so do the files that `interop` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.atomic import atomic_folder
from jahubert.formats.hub import resolve_model
from jahubert.formats.state_dict import (
    RawModel,
    fields_from_shapes,
    load_tensors,
    make_config,
    new_mask_embedding,
    read_tensors,
    select_tensors,
)
from jahubert.formats.torchaudio import hf_symbols, hf_vocabulary, read_file, read_json, symbol_set
from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

FORMAT = 1

# Our field -> Hugging Face's key, for the fields that only change their name.
_HF_KEYS = {
    "conv_dims": "conv_dim",
    "conv_kernels": "conv_kernel",
    "conv_strides": "conv_stride",
    "conv_bias": "conv_bias",
    "conv_norm": "feat_extract_norm",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "pre_norm": "do_stable_layer_norm",
    "pos_conv_kernel": "num_conv_pos_embeddings",
    "pos_conv_groups": "num_conv_pos_embedding_groups",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "input_dropout": "feat_proj_dropout",
    "layer_drop": "layerdrop",
}
# Fields that Hugging Face has no key for.
_OWN_FIELDS = ("conv_grad_scale", "normalize", "normalize_eps")
INFO = "jahubert.json"
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
SPECIAL_ROWS = "special_rows"  # beside the tensors of the pretraining head
HEAD = "lm_head.weight"  # of a CTC model


@dataclass
class Bundle:
    """An opened model; `model` is `ctc.hubert` where there is a CTC head. All in eval mode."""

    config: HubertConfig
    model: HubertModel
    ctc: HubertForCtc | None = None
    phonemes: PhonemeSet | None = None
    unit_head: UnitHead | None = None
    centroids_KD: Tensor | None = None
    centroid_layer: int | None = None
    info: dict = field(default_factory=dict)  # jahubert.json as it was read, or which file it came from
    special_rows: Tensor | None = None  # (4, dim): in front of fairseq's codebook, kept for the way back
    notes: list[str] = field(default_factory=list)  # what reading left out or made anew, a sentence each


def save_bundle(
    path: str | os.PathLike,
    *,
    model: HubertModel | None = None,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
    centroids_KD: Tensor | None = None,
    centroid_layer: int | None = None,
    info: dict | None = None,
    special_rows: Tensor | None = None,
) -> Path:
    """Write a bundle, replacing an older one of that name only when the new one is complete.

    Raises:
        ConfigError: no model is given, or `path` exists and is no bundle.
    """
    hubert = ctc.hubert if ctc is not None else model
    if hubert is None:
        raise ConfigError("save_bundle needs a model or a ctc model")
    path = Path(path)
    if path.exists() and not (path / INFO).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: exists and is not a bundle; remove it or choose another name")
    weights: nn.Module = ctc if ctc is not None else hubert
    extra = {
        "format": FORMAT,
        "config": {name: getattr(hubert.config, name) for name in _OWN_FIELDS},
        "temperature": None if unit_head is None else unit_head.temperature,
        "phonemes": None if phonemes is None else phonemes.to_json(),
        "centroid_layer": centroid_layer,
        "weights": weights_hash(hubert),
        **(info or {}),
    }
    with atomic_folder(path) as folder:
        save_file(_plain(weights.state_dict()), folder / SAFE, metadata={"format": "pt"})
        _write_json(folder / "config.json", _to_hf(hubert.config, ctc, phonemes))
        _write_json(folder / "preprocessor_config.json", _preprocessor(hubert.config))
        if ctc is not None and phonemes is not None:
            _write_json(folder / "vocab.json", hf_vocabulary(phonemes))
        if unit_head is not None:
            heads = unit_head.state_dict() | ({} if special_rows is None else {SPECIAL_ROWS: special_rows})
            save_file(_plain(heads), folder / "pretraining_heads.safetensors")
        if centroids_KD is not None:
            centroids = {"centroids_KD": centroids_KD.detach().float().cpu().contiguous()}
            save_file(centroids, folder / "centroids.safetensors")
        _write_json(folder / INFO, extra)
        card = _model_card(path.name, hubert, extra, ctc is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def load_bundle(source: str | os.PathLike) -> Bundle:
    """Open a bundle, a Hugging Face HuBERT folder or Hub name, or a fairseq, s3prl or torchaudio file.

    Raises:
        CheckpointError: the folder, a file in it or a tensor is missing, broken or of the wrong shape.
    """
    path = resolve_model(source)
    parts = _read_folder(path) if path.is_dir() else read_file(path)
    config, weights = parts.config, parts.weights
    ctc, unit_head = None, None
    if parts.head:
        n_units, dim = parts.head["label_embeddings"].shape
        unit_head = UnitHead(config.width, n_units, dim, parts.temperature)
        _fill(path, unit_head, parts.head)
    if HEAD in weights:
        ctc = HubertForCtc(config, len(weights[HEAD]))
        model = ctc.hubert
        _fill(path, ctc, weights, lambda name: name.removeprefix("hubert."))
    else:
        model = HubertModel(config)
        _fill(path, model, weights)
    for module in (model, ctc, unit_head):
        if module is not None:
            module.eval()
    return Bundle(
        config, model, ctc, parts.phonemes, unit_head, parts.centroids_KD, parts.info.get("centroid_layer"),
        parts.info, parts.special_rows, parts.notes,
    )  # fmt: skip


def _read_folder(path: Path) -> RawModel:
    """A bundle or a Hugging Face folder."""
    hf = read_json(path / "config.json")
    if hf.get("model_type") != "hubert":
        raise CheckpointError(
            f"{path}/config.json: model_type is {hf.get('model_type')!r}, but must be 'hubert'"
        )
    extra = read_json(path / "jahubert.json") if (path / "jahubert.json").exists() else {}
    if not isinstance(extra.get("format", FORMAT), int) or not isinstance(extra.get("config", {}), dict):
        raise CheckpointError(f"{path}/jahubert.json: format or config is damaged; copy the folder again")
    if extra.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {extra['format']}, but this jahubert reads up to {FORMAT}; "
            "update jahubert"
        )
    # transformers names the weight norm after whichever torch API saved it, and puts `hubert.` before the
    # names of an encoder under a head.
    weights = {_own_name(name): tensor for name, tensor in _weights(path).items()}
    config = make_config(path, fields_from_shapes(path, weights, str), _fields(path, hf, extra))
    parts = RawModel(config, weights, info=extra)
    if "masked_spec_embed" not in weights:  # Hugging Face leaves it out of models saved without masking
        weights["masked_spec_embed"] = new_mask_embedding(config.width)
        parts.notes.append("mask embedding: the source has none, so a new one was drawn")
    if extra.get("phonemes"):
        parts.phonemes = symbol_set(path / "jahubert.json", extra["phonemes"])
    elif HEAD in weights:
        parts.phonemes = hf_symbols(path, hf, len(weights[HEAD]))
    if (path / "pretraining_heads.safetensors").exists():
        parts.head = _tensors_with(path / "pretraining_heads.safetensors", "label_embeddings")
        parts.special_rows = parts.head.pop(SPECIAL_ROWS, None)
        parts.temperature = extra.get("temperature") or parts.temperature
    if (path / "centroids.safetensors").exists():
        parts.centroids_KD = _tensors_with(path / "centroids.safetensors", "centroids_KD")["centroids_KD"]
    return parts


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from one file or from the shards that an index names."""
    file = next((path / name for name in (SAFE, BIN) if (path / name).exists()), path / SAFE)
    index = next(
        (path / f"{name}.index.json" for name in (SAFE, BIN) if (path / f"{name}.index.json").exists()), None
    )
    if file.exists() or index is None:
        return load_tensors(read_tensors(file))
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        os.path.basename(str(name)) == name for name in shards.values()
    ):
        raise CheckpointError(f"{index}: weight_map must name files of this folder; copy the file again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        tensors |= load_tensors(read_tensors(path / name))
    return tensors


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values: which weights these are, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _tensors_with(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of ours, `name` among them, a matrix."""
    tensors = load_tensors(read_tensors(path))
    if name not in tensors or tensors[name].dim() != 2:
        raise CheckpointError(f"{path}: has no matrix {name}; copy the file again, or take it away")
    return tensors


def _own_name(name: str) -> str:
    """Our name of a tensor of a Hugging Face model."""
    for suffix, own in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(
            f"pos_conv_embed.conv.{suffix}", f"pos_conv_embed.conv.parametrizations.weight.{own}"
        )
    return name.removeprefix("hubert.")


def _fill(
    path: Path, module: nn.Module, weights: dict[str, Tensor], named: Callable[[str], str] = str
) -> None:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module.load_state_dict(select_tensors(path, shapes, weights, named))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_hf(config: HubertConfig, ctc: HubertForCtc | None, phonemes: PhonemeSet | None) -> dict:
    hf = {key: getattr(config, name) for name, key in _HF_KEYS.items()}
    return hf | {
        "model_type": "hubert",
        "architectures": ["HubertModel" if ctc is None else "HubertForCTC"],
        "num_feat_extract_layers": len(config.conv_dims),
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "feat_proj_layer_norm": True,
        "final_dropout": 0.0,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "vocab_size": 32 if ctc is None else ctc.lm_head.out_features,
        "pad_token_id": 0 if phonemes is None else phonemes.blank,  # the CTC blank
        "torch_dtype": "float32",
    }


def _fields(path: Path, hf: dict, extra: dict) -> dict[str, Any]:
    """HubertConfig's fields from config.json, preprocessor_config.json and jahubert.json."""
    wanted = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "feat_proj_layer_norm": True}
    wanted["conv_pos_batch_norm"] = False
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise CheckpointError(f"{path}/config.json: {key} is {hf[key]!r}; only {value!r} is supported")
    fields = {name: hf[key] for name, key in _HF_KEYS.items() if key in hf}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    # A folder without processor comes from Hugging Face's script for pretrained models, which writes none.
    fields["normalize"] = bool(fields.get("pre_norm", False))
    if (path / "preprocessor_config.json").exists():
        fields["normalize"] = bool(read_json(path / "preprocessor_config.json").get("do_normalize", True))
    return fields | extra.get("config", {})


def _preprocessor(config: HubertConfig) -> dict:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.conv_norm == "layer",
        "sampling_rate": SAMPLE_RATE,
    }


def _model_card(name: str, model: HubertModel, extra: dict, ctc: bool) -> str:
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"# {name}",
        "",
        f"HuBERT with {config.layers} blocks of width {config.width} ({millions:.1f} M parameters), "
        + (
            "fine-tuned with CTC on Japanese phonemes."
            if ctc
            else "pretrained by masked prediction of units."
        ),
        "Input: 16 kHz mono waveforms"
        + (", normalised per utterance." if config.normalize else ", as they are."),
        "",
        "Made with jahubert: `jahubert.FeatureExtractor.from_pretrained(folder)`"
        + (", `jahubert transcribe --model folder audio.wav`." if ctc else "."),
        "",
        "```json",
        json.dumps(
            {key: extra[key] for key in extra if key not in ("phonemes", "config")},
            indent=2,
            ensure_ascii=False,
        ),
        "```",
        "",
    ]
    return "\n".join(lines)
