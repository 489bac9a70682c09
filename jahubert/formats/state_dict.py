"""Raw contents of model files, and checks of tensors and configuration that all formats share.

Every reader converts a file to a `RawModel`: a `HubertConfig` and tensors under Hugging Face's names, which
this package also uses. Each of the other formats has a function that maps these tensor names to its own
names, for its reader, its writer and error messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError, DataError, quote
from jahubert.formats.safe_pickle import read_pickled
from jahubert.formats.typed_fields import typed
from jahubert.limits import ADVICE, CONVS, LAYERS, limit
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

NORMALIZE_EPS = 1e-5  # epsilon of waveform normalization (layer_norm) in fairseq and torchaudio
TORCH_NORM_EPS = 1e-5  # epsilon of all norms in fairseq and torchaudio models
HEAD = "lm_head.weight"  # weight of the CTC head, which only CTC models have
WEIGHT_NORM = [
    (r"parametrizations\.weight\.original0$", "weight_g"),
    (r"parametrizations\.weight\.original1$", "weight_v"),
]


@dataclass
class RawModel:
    """Tensors and settings of a model file or folder, before modules are built."""

    config: HubertConfig
    weights: dict[str, Tensor]  # encoder tensors, and `lm_head.*` for a CTC model
    head: dict[str, Tensor] = field(default_factory=dict)  # tensors of the unit head, if there is one
    temperature: float = 0.1  # temperature of `head`
    special_rows: Tensor | None = None  # codebook rows (4, dim) of fairseq's special symbols
    phonemes: PhonemeSet | None = None
    centroids_KD: Tensor | None = None
    centroid_layer: int | None = None
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # one message per change to the model


# --- names ------------------------------------------------------------------------------------------------


def rename(name: str, rules: list[tuple[str, str]]) -> str:
    """Apply rules (pattern, replacement) to the name of a tensor, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def weight_norm_name(name: str) -> str:
    """Convert the name of a weight norm tensor to that in torch's older API, `weight_g` or `weight_v`."""
    return rename(name, WEIGHT_NORM)


# --- reading ----------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a `.safetensors`, `.pt` or `.bin` file. Tensors in pickled files are returned as `Stored`.

    Raises:
        CheckpointError: the file is missing, damaged or not supported, or its content is not a dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing; download or copy the folder again")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and start[8:] != b"{":
        content = read_pickled(path)
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path}: contains data of type {type(content).__name__} instead of weights"
            )
        return content
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: broken or truncated safetensors file ({error}); download or copy it again"
        ) from error


def tensor_table(content: dict[str, Any]) -> Mapping[Any, Any]:
    """Return the dict of tensors in the result of `read_tensors`, which may be nested in other content."""
    tables = [content[key] for key in ("model_weight", "model", "state_dict") if key in content]
    table = tables[0] if tables else content
    return table if isinstance(table, Mapping) else {}


def file_layout(path: Path, names: Iterable[str]) -> tuple[str, str]:
    """Determine the format of a model file from the names of its tensors.

    Returns:
        The prefix of encoder tensor names, and `fairseq` (also for s3prl) or `torchaudio`.

    Raises:
        CheckpointError: the tensors are not those of a HuBERT model in one of these formats.
    """
    names = set(names)
    front_end = re.compile(r"(.*?)feature_extractor\.conv_layers\.0\.")
    prefixes = {match[1] for name in names if (match := front_end.match(name))}
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path}: not a HuBERT model (tensors: {len(names)}, HuBERT front ends: {len(prefixes)}); give "
            "a fairseq, s3prl or torchaudio file, or a Hugging Face folder"
        )
    (prefix,) = prefixes
    if f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in names:
        return prefix, "fairseq"
    if f"{prefix}encoder.transformer.layers.0.attention.q_proj.weight" in names:
        return prefix, "torchaudio"
    raise CheckpointError(
        f"{path}: its tensor names are neither fairseq's nor torchaudio's; for a Hugging Face model, "
        "give the folder with its config.json"
    )


def symbol_set(where: object, symbols: list[Any]) -> PhonemeSet:
    """Check the symbols of a CTC head, and return them as a PhonemeSet.

    Raises:
        CheckpointError: there are fewer than two symbols, the blank is missing, or a symbol is duplicated,
            unprintable or not a string.
    """
    for symbol in symbols:
        if not typed(where, "a symbol", symbol, str).isprintable():
            raise CheckpointError(f"{where}: symbol {quote(symbol)} has unprintable characters")
    if len(symbols) < 2:
        raise CheckpointError(f"{where}: a CTC model needs at least two symbols, found {len(symbols)}")
    try:
        return PhonemeSet(tuple(symbols))
    except DataError as error:
        raise CheckpointError(f"{where}: {error}") from error


# --- configuration ----------------------------------------------------------------------------------------


def config_field(where: object, field: str, name: str, value: Any) -> Any:
    """Check that a value has the type of a HubertConfig field, and return the value.

    Args:
        where: path of the file, for the error message.
        field: name of the field.
        name: name of the value in the file.
        value: the value to check.

    Raises:
        CheckpointError: `typed` rejects the value.
    """
    default = HubertConfig.__dataclass_fields__[field].default
    return typed(where, name, value, type(default))


def fields_from_shapes(
    where: object, tensors: Mapping[str, Tensor], name_of: Callable[[str], str]
) -> dict[str, Any]:
    """Derive HubertConfig fields from the shapes of encoder tensors.

    Args:
        where: path of the file, for error messages.
        tensors: encoder tensors under their names in the file.
        name_of: function from tensor names in this package to those in the file.

    Raises:
        CheckpointError: a tensor is missing, is empty or has the wrong number of dimensions, or there are too
            many layers.
    """

    def shape(name: str, dims: int) -> torch.Size:
        tensor = tensors.get(name_of(name))
        if tensor is None or tensor.dim() != dims or not tensor.numel():
            problem = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{where}: {name_of(name)} is {problem}, so this is not a complete HuBERT model"
            )
        return tensor.shape

    def count(name: str, most: int) -> int:
        n = 0
        while name_of(name.format(n)) in tensors:
            n += 1
        if n > limit(most):
            raise CheckpointError(
                f"{where}: there are {n} layers with a tensor {name.format('N')}, but at most {limit(most)} "
                f"are allowed; {ADVICE}"
            )
        return n

    conv, ffn = "feature_extractor.conv_layers.{}.conv.", "encoder.layers.{}.feed_forward.intermediate_dense."
    shape(conv.format(0) + "weight", 3)
    convs = [shape(conv.format(n) + "weight", 3) for n in range(count(conv + "weight", CONVS))]
    width, per_group, kernel = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1", 3)
    return {
        "conv_dims": tuple(dim for dim, _, _ in convs),
        "conv_kernels": tuple(taps for _, _, taps in convs),
        "conv_bias": name_of(conv.format(0) + "bias") in tensors,
        "width": width,
        "layers": count(ffn + "weight", LAYERS),
        "ffn": shape(ffn.format(0) + "weight", 2)[0],
        "pos_conv_kernel": kernel,
        "pos_conv_groups": width // per_group,
    }


def make_config(where: object, from_shapes: Mapping[str, Any], settings: Mapping[str, Any]) -> HubertConfig:
    """Create a HubertConfig from weight shapes (`fields_from_shapes`) and the settings in the file.

    Raises:
        CheckpointError: shapes and settings contradict each other, or the configuration is invalid.
    """
    wrong = [
        f"{name} {settings[name]}, not {from_shapes[name]}"
        for name in from_shapes
        if settings.get(name, from_shapes[name]) != from_shapes[name]
    ]
    if wrong:  # this is checked before a model of arbitrary size is built
        raise CheckpointError(
            f"{where}: weights and settings do not match; the settings specify {', '.join(wrong)}. Use both "
            "as they were published"
        )
    try:
        return HubertConfig(**{**from_shapes, **settings})
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: its settings do not describe a HuBERT model: {error}") from error


# --- shapes and values ------------------------------------------------------------------------------------


def encoder_shapes(config: HubertConfig) -> dict[str, tuple[int, ...]]:
    """Compute the names and shapes of encoder tensors without building the encoder."""
    width, ffn, kernel = config.width, config.ffn, config.pos_conv_kernel
    shapes: dict[str, tuple[int, ...]] = {"masked_spec_embed": (width,)}

    def affine(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    channels = 1
    for n, (dim, taps) in enumerate(zip(config.conv_dims, config.conv_kernels, strict=True)):
        layer = f"feature_extractor.conv_layers.{n}"
        shapes[f"{layer}.conv.weight"] = (dim, channels, taps)
        if config.conv_bias:
            shapes[f"{layer}.conv.bias"] = (dim,)
        if n == 0 or config.conv_norm == "layer":
            affine(f"{layer}.layer_norm", dim)
        channels = dim
    affine("feature_projection.layer_norm", channels)
    affine("feature_projection.projection", width, channels)
    position = "encoder.pos_conv_embed.conv"
    shapes[f"{position}.bias"] = (width,)
    shapes[f"{position}.parametrizations.weight.original0"] = (1, 1, kernel)
    shapes[f"{position}.parametrizations.weight.original1"] = (width, width // config.pos_conv_groups, kernel)
    affine("encoder.layer_norm", width)
    for n in range(config.layers):
        block = f"encoder.layers.{n}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            affine(f"{block}.attention.{projection}", width, width)
        affine(f"{block}.layer_norm", width)
        affine(f"{block}.feed_forward.intermediate_dense", ffn, width)
        affine(f"{block}.feed_forward.output_dense", width, ffn)
        affine(f"{block}.final_layer_norm", width)
    return shapes


def count_symbols(where: object, weights: Mapping[str, Tensor], width: int) -> int | None:
    """Return the number of outputs of the CTC head, or None if there is none.

    Raises:
        CheckpointError: the weight of the head is not a matrix, the widths of head and encoder differ, or the
            head has fewer than two outputs.
    """
    if HEAD not in weights:
        return None
    shape = weights[HEAD].shape
    if len(shape) != 2 or shape[0] < 2 or shape[1] != width:
        raise CheckpointError(
            f"{where}: {HEAD}, the CTC head, has shape {tuple(shape)}, but needs (symbols, {width}) with at "
            "least two symbols"
        )
    return shape[0]


def select_tensors(
    where: object,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    name_of: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Select the tensors with the given names and shapes, in float32.

    Args:
        where: path of the file, for error messages.
        shapes: shape of each tensor, keyed by its name in this package.
        tensors: tensors under their names in the file.
        name_of: function from tensor names in this package to those in the file.

    Raises:
        CheckpointError: a tensor is missing or unexpected, has another shape or is not floating-point.
    """
    names = {name_of(name): name for name in shapes}
    missing = [name for name in names if name not in tensors]
    unknown = sorted(tensors.keys() - names.keys())
    wrong = []
    for name, target in names.items():
        if name in tensors and tensors[name].shape != shapes[target]:
            wrong.append(f"{name} is {tuple(tensors[name].shape)}, expected {shapes[target]}")
        elif name in tensors and not tensors[name].is_floating_point():
            wrong.append(f"{name} is of type {tensors[name].dtype}")
    problems = wrong[:5]
    if unknown:
        problems.insert(0, f"unknown {unknown[:5]}")
    if missing:
        problems.insert(0, f"missing {missing[:5]}")
    if problems:
        raise CheckpointError(
            f"{where}: the weights do not match the HuBERT model described by the settings: "
            + "; ".join(problems)
            + ". Use both as they were published"
        )
    return {target: tensors[name].float() for name, target in names.items()}


def new_mask_embedding(width: int) -> Tensor:
    """Create a mask embedding (D,) for a model that lacks it, with random values from a fixed seed."""
    return torch.rand(width, generator=torch.Generator().manual_seed(0))


# --- writing ----------------------------------------------------------------------------------------------


def portable_state(model: HubertModel, target: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the encoder tensors for fairseq or torchaudio, and append a message to `notes` for each change.

    Raises:
        CheckpointError: the target would compute different outputs with these weights.
    """
    config = model.config
    if config.norm_eps != TORCH_NORM_EPS:
        raise CheckpointError(
            f"norm_eps is {config.norm_eps}, but {target} always uses {TORCH_NORM_EPS} and would compute "
            "different results; choose another format"
        )
    if config.normalize and config.normalize_eps != NORMALIZE_EPS:
        notes.append(
            f"epsilon of waveform normalization: {target} uses {NORMALIZE_EPS} instead of the source's "
            f"{config.normalize_eps}; results differ for very quiet audio only"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    biases = [
        name for name in state if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.conv\.bias", name)
    ]
    if biases and not any(state[name].any() for name in biases):
        # The published large models have no biases; Hugging Face's copies of them contain zeros.
        state = {name: value for name, value in state.items() if name not in biases}
        notes.append("biases of the front end: all zero and omitted, as in the published models")
    return state
