"""Reader for Hugging Face HuBERT folders, and the content of the JSON files that bundles share with them.

Weights are in one file or in shards, as safetensors or PyTorch `.bin` files. This package uses the same
tensor names as Hugging Face. The reader removes the prefix `hubert.`, which encoder tensors have in a model
with a head, and converts the older names of weight norm tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, quote
from jahubert.formats.model_files import (
    ADDED_TOKENS,
    CONFIG,
    PREPROCESSOR,
    SAFE,
    TOKENIZER,
    VOCABULARY,
    weight_files,
)
from jahubert.formats.safe_pickle import load_tensors
from jahubert.formats.state_dict import (
    RawModel,
    config_field,
    count_symbols,
    fields_from_shapes,
    make_config,
    new_mask_embedding,
    read_tensors,
    symbol_set,
)
from jahubert.formats.typed_fields import read_json, read_optional_json, typed_item
from jahubert.frames import SAMPLE_RATE
from jahubert.model.hubert import HubertConfig
from jahubert.phonemes import BLANK, BOUNDARY, PhonemeSet

# HubertConfig field -> key in Hugging Face's configuration.
_KEYS = {
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
# Settings for which only one value is supported.
_FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
}


def read_huggingface(folder: Path, fields: Mapping[str, Any] | None = None) -> RawModel:
    """Read a Hugging Face folder.

    Args:
        folder: path of the folder.
        fields: values of HubertConfig fields that have no Hugging Face key, if known.

    Raises:
        CheckpointError: a file is missing, damaged or not supported, or does not belong to a HuBERT model.
    """
    settings = read_json(folder / CONFIG)
    if settings.get("model_type") != "hubert":
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {quote(settings.get('model_type'))}, but must be 'hubert'"
        )
    weights = {_our_name(name): tensor for name, tensor in _read_weights(folder).items()}
    from_shapes = fields_from_shapes(folder, weights, str)
    config = make_config(folder, from_shapes, _config_fields(folder, settings) | dict(fields or {}))
    raw = RawModel(config, weights)
    if "masked_spec_embed" not in weights:  # models that were saved without masking have no mask embedding
        weights["masked_spec_embed"] = new_mask_embedding(config.width)
        raw.notes.append("mask embedding: missing in the source, initialized at random")
    n_symbols = count_symbols(folder, weights, config.width)
    if n_symbols is not None:
        raw.phonemes = _read_symbols(folder, settings, n_symbols)
    return raw


def huggingface_config(
    config: HubertConfig, phonemes: PhonemeSet | None, n_symbols: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        n_symbols: output size of the CTC head, or None without a CTC head.
        dtype: dtype of the weights in the file.
    """
    settings = {key: getattr(config, name) for name, key in _KEYS.items()}
    return settings | {
        "model_type": "hubert",
        "architectures": ["HubertModel" if n_symbols is None else "HubertForCTC"],
        "num_feat_extract_layers": len(config.conv_dims),
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "feat_proj_layer_norm": True,
        "final_dropout": 0.0,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "vocab_size": 32 if n_symbols is None else n_symbols,
        "pad_token_id": 0 if phonemes is None else phonemes.blank,  # index of the CTC blank
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def preprocessor_config(config: HubertConfig) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.conv_norm == "layer",
        "sampling_rate": SAMPLE_RATE,
    }


def vocabulary(phonemes: PhonemeSet) -> dict[str, int]:
    """Return the content of vocab.json, in which the blank is named `<pad>`."""
    names = {BLANK: "<pad>"}
    # In a model from fairseq, <pad> is an ordinary symbol. It takes the name <s>, which the blank had there.
    names["<pad>"] = "<pad >" if "<s>" in phonemes.symbols else "<s>"
    return {names.get(symbol, symbol): row for row, symbol in enumerate(phonemes.symbols)}


def tokenizer_config(phonemes: PhonemeSet) -> dict[str, Any] | None:
    """Return the content of tokenizer_config.json, or None if the default tokenizer for HuBERT is suitable.

    The default tokenizer joins the symbols of a word, which is ambiguous for phones, because a phone can have
    several characters. The phoneme tokenizer separates all symbols with spaces.
    """
    if not phonemes.are_phones:
        return None
    return {"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "do_phonemize": False, "pad_token": "<pad>"}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors in a folder from one file or from the shards listed in an index."""
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: {SAFE} is missing; download or copy the folder again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_tensors(file, read_tensors(file))
    return tensors


def _our_name(name: str) -> str:
    """Convert a tensor name of Hugging Face to the name in this package."""
    for suffix, own in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(
            f"pos_conv_embed.conv.{suffix}", f"pos_conv_embed.conv.parametrizations.weight.{own}"
        )
    return name.removeprefix("hubert.")


def _config_fields(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read HubertConfig fields from config.json and preprocessor_config.json."""
    path = folder / CONFIG
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {quote(settings[key])}; only {value!r} is supported")
    fields = {
        name: config_field(path, name, key, settings[key]) for name, key in _KEYS.items() if key in settings
    }
    # Hugging Face's conversion script writes no preprocessor_config.json for pretrained models, of which the
    # pre-norm ones (large, xlarge) expect normalized waveforms.
    fields["normalize"] = fields.get("pre_norm", False)
    processor = folder / PREPROCESSOR
    if processor.exists():
        fields["normalize"] = typed_item(processor, read_json(processor), "do_normalize", bool, True)
    return fields


def _read_symbols(folder: Path, settings: dict[str, Any], n_rows: int) -> PhonemeSet | None:
    """Read the symbols of a CTC head in row order, or return None if the folder has no vocabulary.

    The blank is the row with the index `pad_token_id` from config.json, whatever its name. The word delimiter
    is taken from tokenizer_config.json. A row that has no name in the vocabulary is named after its index.
    """
    path = folder / VOCABULARY
    if not path.is_file():
        return None
    rows = {**read_json(path), **read_optional_json(folder / ADDED_TOKENS)}
    names = {row: name for name, row in rows.items() if type(row) is int and 0 <= row < n_rows}
    symbols = [names.get(row, f"<{row}>") for row in range(n_rows)]
    blank = typed_item(folder / CONFIG, settings, "pad_token_id", int, 0)
    if not 0 <= blank < n_rows:
        raise CheckpointError(
            f"{folder / CONFIG}: pad_token_id, the CTC blank, is {blank}, but the head has {n_rows} "
            "outputs; set it to the blank index used in training"
        )
    tokenizer = folder / TOKENIZER
    delimiter = typed_item(
        tokenizer, _content(read_optional_json(tokenizer)), "word_delimiter_token", str, BOUNDARY
    )
    if delimiter in symbols and BOUNDARY not in symbols:
        symbols[symbols.index(delimiter)] = BOUNDARY
    symbols[blank] = BLANK
    return symbol_set(path, symbols)


def _content(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Unwrap the word delimiter if the tokenizer file stores it as an object with the key `content`."""
    token = tokenizer.get("word_delimiter_token")
    return tokenizer | ({"word_delimiter_token": token.get("content")} if isinstance(token, dict) else {})
