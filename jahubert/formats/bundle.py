"""Bundles, which are self-describing model folders that Hugging Face `transformers` can open.

    config.json  model.safetensors  preprocessor_config.json     Hugging Face's layout
    vocab.json                                                  CTC models: symbol -> index
    tokenizer_config.json                                       CTC models of phones
    jahubert.json                                               format version, symbols, checksums and more
    centroids.safetensors  pretraining_heads.safetensors        if present
    language_model.arpa.gz                                      if present: n-gram over the symbols
    README.md                                                   model card

`load_bundle` opens models in all supported formats except ONNX, in four steps: `resolve_model` finds the file
or folder, the reader for its format converts it to a `RawModel`, the tensors are checked, and modules are
built.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jahubert.errors import CheckpointError, ConfigError, quote
from jahubert.formats.atomic import atomic_folder
from jahubert.formats.fairseq import read_fairseq
from jahubert.formats.hub import resolve_model
from jahubert.formats.huggingface import (
    huggingface_config,
    preprocessor_config,
    read_huggingface,
    tokenizer_config,
    vocabulary,
)
from jahubert.formats.model_card import model_card
from jahubert.formats.model_files import (
    CENTROIDS,
    CONFIG,
    HEADS,
    INFO,
    LANGUAGE_MODEL,
    PREPROCESSOR,
    SAFE,
    TOKENIZER,
    VOCABULARY,
)
from jahubert.formats.safe_pickle import load_tensors
from jahubert.formats.state_dict import (
    HEAD,
    RawModel,
    config_field,
    count_symbols,
    encoder_shapes,
    file_layout,
    read_tensors,
    select_tensors,
    symbol_set,
    tensor_table,
    weight_norm_name,
)
from jahubert.formats.torchaudio import read_torchaudio
from jahubert.formats.typed_fields import read_json, typed, typed_item
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

FORMAT = 1
CALIBRATION_KEY = "confidence"  # key of jahubert.json for the calibration of word confidences
# Keys of jahubert.json that `save_bundle` sets itself.
INFO_KEYS = (
    "format", "config", "temperature", "phonemes", "centroid_layer", "language_model", "weights", "files",
    "checksum",
)  # fmt: skip
# HubertConfig fields that have no key in Hugging Face's configuration.
_CONFIG_FIELDS = ("conv_grad_scale", "normalize", "normalize_eps")
_SPECIAL_ROWS = "special_rows"  # name of a tensor that is stored with those of the pretraining head


@dataclass(frozen=True)
class LanguageModel:
    """An n-gram model over the symbols of a CTC model, with its parameters for beam search."""

    path: Path  # gzip-compressed ARPA file
    weight: float  # factor for the log-probability
    word_bonus: float  # score added per symbol


@dataclass
class Bundle:
    """A loaded model with its heads, all in eval mode. With a CTC head, `model` is `ctc.hubert`."""

    config: HubertConfig
    model: HubertModel
    ctc: HubertForCtc | None = None
    phonemes: PhonemeSet | None = None
    unit_head: UnitHead | None = None
    centroids_KD: Tensor | None = None
    centroid_layer: int | None = None
    info: dict[str, Any] = field(default_factory=dict)  # content of jahubert.json, or origin of a file
    special_rows: Tensor | None = None  # fairseq's special codebook rows (4, dim), for conversion to fairseq
    notes: list[str] = field(default_factory=list)  # one message per change to the model
    language_model: LanguageModel | None = None  # used by `Transcriber` without its own `lm` or `lexicon`


# --- writing ----------------------------------------------------------------------------------------------


def save_bundle(
    path: str | os.PathLike[str],
    *,
    model: HubertModel | None = None,
    ctc: HubertForCtc | None = None,
    phonemes: PhonemeSet | None = None,
    unit_head: UnitHead | None = None,
    centroids_KD: Tensor | None = None,
    centroid_layer: int | None = None,
    info: dict[str, Any] | None = None,
    special_rows: Tensor | None = None,
    language_model: LanguageModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a bundle. An existing bundle is replaced once the new one is complete.

    Args:
        path: folder to write.
        centroid_layer: layer whose output was clustered to compute the centroids.
        info: additional content of jahubert.json.
        special_rows: codebook rows of fairseq's special symbols, stored with `unit_head`.
        language_model: n-gram model that is copied into the bundle.
        dtype: dtype of the weights in model.safetensors, which `load_bundle` converts to float32.

    Raises:
        ConfigError: no model is given, centroids are given without their layer, or `path` exists and is
            neither a bundle nor an empty folder.
    """
    hubert = ctc.hubert if ctc is not None else model
    if hubert is None:
        raise ConfigError("save_bundle needs `model` or `ctc`")
    if centroids_KD is not None and centroid_layer is None:
        raise ConfigError("save_bundle needs centroid_layer, the layer whose output was clustered")
    path = Path(path)
    if path.exists() and not (path / INFO).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not a bundle; remove it or choose another name")
    extra = {
        "format": FORMAT,
        "config": {name: getattr(hubert.config, name) for name in _CONFIG_FIELDS},
        "temperature": None if unit_head is None else unit_head.temperature,
        "phonemes": None if phonemes is None else phonemes.to_json(),
        "centroid_layer": centroid_layer,
        "language_model": None
        if language_model is None
        else {"weight": language_model.weight, "word_bonus": language_model.word_bonus},
        "weights": _tensors_hash(_as_loaded(hubert.state_dict(), dtype)),
        **(info or {}),
    }
    n_symbols = None if ctc is None else ctc.lm_head.out_features
    with atomic_folder(path) as folder:
        weights: nn.Module = hubert if ctc is None else ctc
        save_file(_savable(weights.state_dict(), dtype), folder / SAFE, metadata={"format": "pt"})
        _write_json(folder / CONFIG, huggingface_config(hubert.config, phonemes, n_symbols, dtype))
        _write_json(folder / PREPROCESSOR, preprocessor_config(hubert.config))
        if ctc is not None and phonemes is not None:
            _write_json(folder / VOCABULARY, vocabulary(phonemes))
            if (tokenizer := tokenizer_config(phonemes)) is not None:
                _write_json(folder / TOKENIZER, tokenizer)
        if unit_head is not None:
            heads = unit_head.state_dict()
            if special_rows is not None:
                heads[_SPECIAL_ROWS] = special_rows
            save_file(_savable(heads), folder / HEADS)
        if centroids_KD is not None:
            save_file(_savable({"centroids_KD": centroids_KD}), folder / CENTROIDS)
        if language_model is not None:
            shutil.copyfile(language_model.path, folder / LANGUAGE_MODEL)
        card = model_card(path.name, hubert, extra, ctc is not None)
        extra["files"] = {file.name: _describe(file) for file in sorted(folder.iterdir())}
        extra["checksum"] = _checksum(extra)
        _write_json(folder / INFO, extra)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and values of a model's tensors."""
    return _tensors_hash(model.state_dict())


def _tensors_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()


def _savable(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().to(dtype).contiguous().clone() for name, tensor in state.items()}


def _as_loaded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors as they are after saving them in `dtype` and loading them."""
    return {name: tensor.to(dtype).float() for name, tensor in state.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- reading ----------------------------------------------------------------------------------------------


def load_bundle(source: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle, a Hugging Face HuBERT folder or Hub name, or a fairseq, s3prl or torchaudio file.

    Without `source`, the built-in model is opened.

    Raises:
        CheckpointError: the model is missing, damaged, inconsistent or in an unsupported format.
        MissingExtraError: a Hub name is given, but huggingface_hub is not installed.
    """
    path = resolve_model(source)
    if not path.is_dir():
        raw = _read_file(path)
    elif (path / INFO).exists():
        raw = _read_bundle(path)
    else:
        raw = read_huggingface(path)
    bundle = _build(path, raw)
    bundle.language_model = _language_model(path, raw.info)
    recorded = raw.info.get("weights")
    if recorded and "files" not in raw.info and recorded != weights_hash(bundle.model):
        raise CheckpointError(
            f"{path}: the weights do not match the hash in {INFO}; copy the bundle again, or delete the "
            f"field `weights` of {INFO} if the change was intended"
        )
    return bundle


def _read_bundle(folder: Path) -> RawModel:
    """Read a bundle, which is a Hugging Face folder with additional files."""
    path = folder / INFO
    info = read_json(path)
    if typed_item(path, info, "format", int, 0) > FORMAT:
        raise CheckpointError(
            f"{folder}: the format version is {info['format']}, but this version of jahubert can read only "
            f"versions up to {FORMAT}; update jahubert"
        )
    _verify(folder, info)
    fields = typed_item(path, info, "config", dict, {})
    for name in fields:
        if name not in _CONFIG_FIELDS:
            raise CheckpointError(
                f"{path}: unknown field {quote(name)} in config; remove it, or update jahubert"
            )
    raw = read_huggingface(folder, {name: config_field(path, name, name, fields[name]) for name in fields})
    raw.info = info
    phonemes = typed_item(path, info, "phonemes", dict)
    if phonemes is not None:
        raw.phonemes = symbol_set(path, typed(path, "symbols", phonemes.get("symbols"), list))
    if (folder / HEADS).exists():
        raw.head = load_tensors(folder / HEADS, read_tensors(folder / HEADS))
        if "label_embeddings" not in raw.head:
            raise CheckpointError(f"{folder / HEADS}: label_embeddings is missing")
        rows = raw.head.pop(_SPECIAL_ROWS, None)
        if rows is not None and (rows.dim() != 2 or not rows.is_floating_point()):
            raise CheckpointError(f"{folder / HEADS}: {_SPECIAL_ROWS} is not a floating-point matrix")
        raw.special_rows = rows
        raw.temperature = typed_item(path, info, "temperature", float, raw.temperature)
        if raw.temperature <= 0:
            raise CheckpointError(f"{path}: temperature is {raw.temperature}, but must be positive")
    raw.centroid_layer = typed_item(path, info, "centroid_layer", int)
    if (folder / CENTROIDS).exists():
        tensors = load_tensors(folder / CENTROIDS, read_tensors(folder / CENTROIDS))
        raw.centroids_KD = _centroids(folder / CENTROIDS, tensors, raw)
    return raw


def _centroids(path: Path, tensors: dict[str, Tensor], raw: RawModel) -> Tensor:
    """Check the centroids and their layer, and return the centroids (K, D)."""
    centroids_KD = tensors.get("centroids_KD")
    if centroids_KD is None or centroids_KD.dim() != 2 or not len(centroids_KD):
        raise CheckpointError(f"{path}: centroids_KD is missing, empty or not a matrix")
    if not centroids_KD.is_floating_point() or centroids_KD.shape[1] != raw.config.width:
        raise CheckpointError(
            f"{path}: centroids_KD has shape {tuple(centroids_KD.shape)} and type {centroids_KD.dtype}, but "
            f"must be a floating-point tensor of width {raw.config.width}"
        )
    if raw.centroid_layer is None or not 0 <= raw.centroid_layer <= raw.config.layers:
        raise CheckpointError(
            f"{path.parent / INFO}: centroid_layer is {raw.centroid_layer}, but must be between 0 and "
            f"{raw.config.layers}"
        )
    return centroids_KD.float()


def _language_model(folder: Path, info: dict[str, Any]) -> LanguageModel | None:
    """Check the language model that jahubert.json describes, and return it, or None if there is none."""
    stored = typed_item(folder / INFO, info, "language_model", dict)
    if stored is None:
        return None
    numbers = [typed_item(folder / INFO, stored, name, float) for name in ("weight", "word_bonus")]
    if any(number is None or not math.isfinite(number) for number in numbers):
        raise CheckpointError(f"{folder / INFO}: language_model needs a finite weight and word_bonus")
    path = folder / LANGUAGE_MODEL
    if not path.is_file():
        raise CheckpointError(
            f"{path}: file not found, but {INFO} describes a language model; copy the bundle again"
        )
    return LanguageModel(path, *numbers)


def _read_file(path: Path) -> RawModel:
    """Read a fairseq, s3prl or torchaudio file. The names of its tensors determine the format."""
    content = read_tensors(path)
    loaded = load_tensors(path, tensor_table(content))
    tensors = {weight_norm_name(name): value for name, value in loaded.items()}
    prefix, layout = file_layout(path, tensors)
    if layout == "torchaudio":
        raw = read_torchaudio(path, tensors, prefix)
    else:
        raw = read_fairseq(path, content, tensors, prefix)
        layout = "s3prl" if "model_weight" in content else "fairseq"
    raw.info = {"origin": {"file": path.name, "layout": layout}}
    return raw


def _build(path: Path, raw: RawModel) -> Bundle:
    """Build float32 modules and load their weights, checking all shapes before allocation."""
    config = raw.config
    n_symbols = count_symbols(path, raw.weights, config.width)
    if raw.phonemes is not None and len(raw.phonemes) != n_symbols:
        found = "no CTC head" if n_symbols is None else f"a CTC head with {n_symbols} outputs"
        raise CheckpointError(f"{path}: the model has {len(raw.phonemes)} symbols, but {found}")
    shapes = encoder_shapes(config)
    ctc, unit_head = None, None
    with torch.device("cpu"), _SkipRandomInit():
        if n_symbols is None:
            weights = select_tensors(path, shapes, raw.weights)
            model = HubertModel(config).float()
            model.load_state_dict(weights)
        else:
            head = {HEAD: (n_symbols, config.width), "lm_head.bias": (n_symbols,)}
            weights = select_tensors(path, shapes | head, raw.weights)
            ctc = HubertForCtc(config, n_symbols).float()
            model = ctc.hubert
            model.load_state_dict({name: weights[name] for name in shapes})
            ctc.lm_head.load_state_dict({name: weights[f"lm_head.{name}"] for name in ("weight", "bias")})
            ctc.eval()
        if raw.head:
            unit_head = _build_unit_head(path, raw)
    return Bundle(
        config,
        model.eval(),
        ctc,
        raw.phonemes,
        unit_head,
        raw.centroids_KD,
        raw.centroid_layer,
        raw.info,
        raw.special_rows,
        raw.notes,
    )


def _build_unit_head(path: Path, raw: RawModel) -> UnitHead:
    table = raw.head["label_embeddings"]
    if table.dim() != 2 or not table.numel():
        raise CheckpointError(
            f"{path}: label_embeddings has shape {tuple(table.shape)}, but must be a matrix (units, dim)"
        )
    n_units, dim = table.shape
    shapes = {
        "label_embeddings": (n_units, dim),
        "final_proj.weight": (dim, raw.config.width),
        "final_proj.bias": (dim,),
    }
    state = select_tensors(path, shapes, raw.head)
    head = UnitHead(raw.config.width, n_units, dim, raw.temperature).float()
    head.load_state_dict(state)
    return head.eval()


class _SkipRandomInit(TorchFunctionMode):
    """Mode that skips the random initialization of modules whose tensors are loaded afterwards."""

    _SKIPPED = (
        nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_,
    )  # fmt: skip

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


# --- checksums --------------------------------------------------------------------------------------------


def _verify(folder: Path, info: dict[str, Any]) -> None:
    """Compare jahubert.json with its checksum, and other files with the sizes and hashes recorded in it.

    Raises:
        CheckpointError: a file is missing, or its content differs from the record.
    """
    path, advice = folder / INFO, "copy the bundle again"
    if ("checksum" in info or "files" in info) and info.get("checksum") != _checksum(info):
        raise CheckpointError(
            f"{path}: damaged or edited; {advice}, or delete its fields `checksum` and `files` if the change "
            "was intended"
        )
    for name, recorded in typed_item(path, info, "files", dict, {}).items():
        file = folder / os.path.basename(name)
        if not file.is_file() or _describe(file) != recorded:
            raise CheckpointError(
                f"{file}: missing, or its size or checksum differs from the record in {INFO}; {advice}, or "
                f"delete the fields `checksum` and `files` of {INFO} if the change was intended"
            )


def _describe(file: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _checksum(info: dict[str, Any]) -> str:
    """Return the SHA-256 of jahubert.json without its own checksum."""
    content = {key: value for key, value in info.items() if key != "checksum"}
    content = json.loads(json.dumps(content))  # converts all keys to strings, as reading the file does
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
