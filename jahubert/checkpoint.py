"""Bundles: a model folder that explains itself and that Hugging Face `transformers` opens as it is.

    config.json  model.safetensors  preprocessor_config.json     Hugging Face's layout
    vocab.json                                                  CTC models: symbol -> index
    jahubert.json                                               format, phoneme set, unit layer, origin
    centroids.safetensors  pretraining_heads.safetensors        where they exist
    README.md                                                   a model card

A Hugging Face HuBERT folder without our extra files opens as well. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jahubert.errors import CheckpointError, ConfigError, MissingExtraError
from jahubert.frames import SAMPLE_RATE
from jahubert.heads import HubertForCtc, UnitHead
from jahubert.hubert import HubertConfig, HubertModel
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


@dataclass
class Bundle:
    """An opened model folder; `model` is `ctc.hubert` where there is a CTC head. All in eval mode."""

    config: HubertConfig
    model: HubertModel
    ctc: HubertForCtc | None = None
    phonemes: PhonemeSet | None = None
    unit_head: UnitHead | None = None
    centroids_KD: Tensor | None = None
    centroid_layer: int | None = None
    info: dict = field(default_factory=dict)  # jahubert.json as it was read


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
) -> Path:
    """Write a bundle beside `path` and rename it there, replacing an older one only when complete."""
    hubert = ctc.hubert if ctc is not None else model
    if hubert is None:
        raise ConfigError("save_bundle needs a model or a ctc model")
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weights: nn.Module = ctc if ctc is not None else hubert
    save_file(_plain(weights.state_dict()), beside / "model.safetensors", metadata={"format": "pt"})
    _write_json(beside / "config.json", _to_hf(hubert.config, phonemes if ctc is not None else None))
    _write_json(beside / "preprocessor_config.json", _preprocessor(hubert.config))
    if ctc is not None and phonemes is not None:
        # Hugging Face's blank is the pad token; its usual name makes our folder open there unchanged.
        names = ["<pad>", *phonemes.symbols[1:]]
        _write_json(beside / "vocab.json", {name: index for index, name in enumerate(names)})
    if unit_head is not None:
        save_file(_plain(unit_head.state_dict()), beside / "pretraining_heads.safetensors")
    if centroids_KD is not None:
        save_file(
            {"centroids_KD": centroids_KD.detach().float().cpu().contiguous()},
            beside / "centroids.safetensors",
        )
    extra = {
        "format": FORMAT,
        "config": {"conv_grad_scale": hubert.config.conv_grad_scale, "normalize": hubert.config.normalize},
        "phonemes": None if phonemes is None else phonemes.to_json(),
        "centroid_layer": centroid_layer,
        "weights": weights_hash(hubert),
        **(info or {}),
    }
    _write_json(beside / "jahubert.json", extra)
    (beside / "README.md").write_text(
        _model_card(path.name, hubert, extra, ctc is not None), encoding="utf-8"
    )
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        beside.rename(path)
        shutil.rmtree(old)
    else:
        beside.rename(path)
    return path


def load_bundle(source: str | os.PathLike) -> Bundle:
    """Open a bundle, or a Hugging Face HuBERT folder or Hub name.

    Raises:
        CheckpointError: the folder, a file in it or a tensor is missing, broken or of the wrong shape.
    """
    path = _folder(source)
    hf = _read_json(path / "config.json")
    if hf.get("model_type") != "hubert":
        raise CheckpointError(
            f"{path}/config.json: model_type is {hf.get('model_type')!r}, but must be 'hubert'"
        )
    extra = _read_json(path / "jahubert.json") if (path / "jahubert.json").exists() else {}
    if extra.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {extra['format']}, but this jahubert reads up to {FORMAT}; "
            "update jahubert"
        )
    config = _from_hf(path, hf, extra)
    weights = _read_tensors(path / "model.safetensors")
    head_keys = {"lm_head.weight", "lm_head.bias"}
    phonemes = PhonemeSet.from_json(extra["phonemes"]) if extra.get("phonemes") else None
    ctc = None
    if head_keys <= weights.keys():
        ctc = HubertForCtc(config, weights["lm_head.weight"].shape[0])
        _load(path, ctc, weights)
        model = ctc.hubert
    else:
        model = HubertModel(config)
        _load(path, model, weights)
    unit_head = None
    if (path / "pretraining_heads.safetensors").exists():
        heads = _read_tensors(path / "pretraining_heads.safetensors")
        n_units, dim = heads["label_embeddings"].shape
        unit_head = UnitHead(config.width, n_units, dim)
        _load(path, unit_head, heads)
    centroids = None
    if (path / "centroids.safetensors").exists():
        centroids = _read_tensors(path / "centroids.safetensors")["centroids_KD"]
    for module in (model, ctc, unit_head):
        if module is not None:
            module.eval()
    return Bundle(config, model, ctc, phonemes, unit_head, centroids, extra.get("centroid_layer"), extra)


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


def _load(path: Path, module: nn.Module, weights: dict[str, Tensor]) -> None:
    own = module.state_dict()
    # transformers names the weight norm after whichever torch API saved it.
    old = {
        "conv.weight_g": "conv.parametrizations.weight.original0",
        "conv.weight_v": "conv.parametrizations.weight.original1",
    }
    for suffix, name in old.items():
        for key in [key for key in weights if key.endswith("pos_conv_embed." + suffix)]:
            weights[key.removesuffix(suffix) + name] = weights.pop(key)
    prefix = "" if any(key.startswith("hubert.") for key in own) else "hubert."
    if prefix and all(key.startswith(prefix) or key.startswith("lm_head.") for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    mask_key = next((key for key in own if key.endswith("masked_spec_embed")), None)
    if (
        mask_key and mask_key not in weights
    ):  # Hugging Face leaves it out of models that were saved without masking
        weights[mask_key] = own[mask_key]
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [
        f"{key} is {tuple(weights[key].shape)}, but the config asks for {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or extra or wrong:
        says = [
            f"missing {missing[:5]}" * bool(missing),
            f"unknown {extra[:5]}" * bool(extra),
            *sorted(wrong)[:5],
        ]
        raise CheckpointError(f"{path}: weights do not fit config.json: " + "; ".join(filter(None, says)))
    module.load_state_dict({key: value.float() for key, value in weights.items()})


def _folder(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "bundle" / "config.json").exists():
            return path / "bundle"  # the output folder of a training stage
        return path
    name = str(source)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(
            f"{name}: no such model folder; give a bundle folder or a Hub name such as owner/model"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the Hub's errors share no base class
        raise CheckpointError(
            f"{name}: no such folder, and the Hub did not give it either: {error}"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model folder, {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: {path.name} is missing; this reads safetensors weights only"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: broken or truncated safetensors file ({error}); copy it again"
        ) from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_hf(config: HubertConfig, phonemes: PhonemeSet | None) -> dict:
    hf = {key: getattr(config, name) for name, key in _HF_KEYS.items()}
    return hf | {
        "model_type": "hubert",
        "architectures": ["HubertModel" if phonemes is None else "HubertForCTC"],
        "num_feat_extract_layers": len(config.conv_dims),
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "feat_proj_layer_norm": True,
        "final_dropout": 0.0,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "vocab_size": 32 if phonemes is None else len(phonemes),
        "pad_token_id": 0,  # the CTC blank
        "torch_dtype": "float32",
    }


def _from_hf(path: Path, hf: dict, extra: dict) -> HubertConfig:
    wanted = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "feat_proj_layer_norm": True}
    wanted["conv_pos_batch_norm"] = False
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise CheckpointError(f"{path}/config.json: {key} is {hf[key]!r}; only {value!r} is supported")
    fields = {name: hf[key] for name, key in _HF_KEYS.items() if key in hf}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    processor = (
        _read_json(path / "preprocessor_config.json") if (path / "preprocessor_config.json").exists() else {}
    )
    fields["normalize"] = bool(processor.get("do_normalize", fields.get("pre_norm", False)))
    fields.update(extra.get("config", {}))
    try:
        return HubertConfig(**fields)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}/config.json: {error}") from error


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
