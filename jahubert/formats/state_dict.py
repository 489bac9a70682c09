"""What weights are called elsewhere, and how they are taken out of a file and checked.

Hugging Face's names are our own, so each other layout is one function from our name of a tensor to its name
there. It serves reading and writing, and what a file has too much or too little is reported in its own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.safe_pickle import Stored, read_pickled
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

NORMALIZE_EPS = 1e-5  # of fairseq and torchaudio, which normalise waveforms by layer_norm
TORCH_NORM_EPS = 1e-5  # of every norm in a model of theirs

_WEIGHT_NORM = [
    (r"parametrizations\.weight\.original0$", "weight_g"),
    (r"parametrizations\.weight\.original1$", "weight_v"),
]
_FAIRSEQ = [
    (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
    (r"^masked_spec_embed$", "mask_emb"),
    *_WEIGHT_NORM,
]
_TORCHAUDIO = [
    (r"^feature_projection\.", "encoder.feature_projection."),
    (r"^encoder\.(pos_conv_embed|layer_norm|layers)\b", r"encoder.transformer.\1"),
    *_WEIGHT_NORM,
]


@dataclass
class RawModel:
    """What was read from somewhere: tensors in Hugging Face's names, not yet in modules."""

    config: HubertConfig
    weights: dict[str, Tensor]  # of the encoder, and `lm_head.*` where there is a CTC head
    head: dict[str, Tensor] = field(default_factory=dict)  # UnitHead's; empty where there is none
    temperature: float = 0.1  # of that head
    special_rows: Tensor | None = None  # fairseq's four rows in front of the codebook
    phonemes: PhonemeSet | None = None
    centroids_KD: Tensor | None = None
    info: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was left out or made anew, a sentence each


def fairseq_name(name: str, conv_norm: str = "group") -> str:
    """fairseq's name of one of our encoder's tensors."""
    place = "2" if conv_norm == "group" else "2.1"  # a layer norm stands between two transpositions
    name = re.sub(r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", rf"\1.{place}.", name)
    return _renamed(name, _FAIRSEQ)


def torchaudio_name(name: str) -> str:
    """torchaudio's name of one of our encoder's tensors; it has none for the mask embedding."""
    return _renamed(name, _TORCHAUDIO)


def weight_norm_name(name: str) -> str:
    """`weight_g` and `weight_v`, whichever way of torch to normalise a weight saved it."""
    return _renamed(name, _WEIGHT_NORM)


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def encoder_shapes(config: HubertConfig) -> dict[str, torch.Size]:
    """Names and shapes of the encoder's tensors."""
    with torch.device("meta"):
        return {name: value.shape for name, value in HubertModel(config).state_dict().items()}


def new_mask_embedding(width: int) -> Tensor:
    """A mask embedding (D,) for weights that came without: drawn as for training, always the same one."""
    return torch.rand(width, generator=torch.Generator().manual_seed(0))


def portable_state(model: HubertModel, target: str, notes: list[str]) -> dict[str, Tensor]:
    """The encoder's tensors by our names, for fairseq or torchaudio; what is lost on the way goes to `notes`.

    Raises:
        CheckpointError: the target would compute something else with these weights.
    """
    config = model.config
    if config.norm_eps != TORCH_NORM_EPS:
        raise CheckpointError(
            f"norm_eps is {config.norm_eps}, but {target} has {TORCH_NORM_EPS} built in and would give other "
            "results; take another format"
        )
    if config.normalize and config.normalize_eps != NORMALIZE_EPS:
        notes.append(
            f"epsilon of the normalised waveform: {target} has {NORMALIZE_EPS}, the source "
            f"{config.normalize_eps}; only very quiet audio shows it"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    biases = [
        name for name in state if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.conv\.bias", name)
    ]
    if biases and not any(state[name].any() for name in biases):
        # Large models have none where they were trained; Hugging Face's copies carry zeros.
        state = {name: value for name, value in state.items() if name not in biases}
        notes.append(
            "biases of the front end: all zero, so they were left out, as the published models have none"
        )
    return state


def select_tensors(
    where: object,
    shapes: Mapping[str, torch.Size],
    found: Mapping[str, Tensor],
    named: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """The tensors `shapes` asks for, float32, out of `found`, where they are called `named(...)`.

    Raises:
        CheckpointError: one is missing or of another shape, or `found` holds others as well.
    """
    theirs = {named(name): name for name in shapes}
    missing, extra = [name for name in theirs if name not in found], sorted(found.keys() - theirs.keys())
    wrong = [
        f"{name} is {tuple(found[name].shape)} and not {tuple(shapes[ours])}"
        for name, ours in theirs.items()
        if name in found and found[name].shape != shapes[ours]
    ]
    if missing or extra or wrong:
        says = [f"missing {missing[:5]}" * bool(missing), f"unknown {extra[:5]}" * bool(extra), *wrong[:5]]
        raise CheckpointError(
            f"{where}: the weights are not those of the HuBERT that its settings describe: "
            + "; ".join(filter(None, says))
            + ". Take both as they were published"
        )
    return {ours: found[name].float() for name, ours in theirs.items()}


def fields_from_shapes(
    where: object, found: Mapping[str, Tensor], named: Callable[[str], str]
) -> dict[str, Any]:
    """The fields of HubertConfig that the shapes of an encoder show.

    Raises:
        CheckpointError: a tensor is missing without which there is no encoder.
    """

    def shape(ours: str, dims: int) -> torch.Size:
        tensor = found.get(named(ours))
        if tensor is None or tensor.dim() != dims:
            says = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{where}: {named(ours)} is {says}, so this is not a whole HuBERT; copy it again "
                "or take another"
            )
        return tensor.shape

    def count(ours: str) -> int:
        return next(n for n in range(len(found) + 1) if named(ours.format(n)) not in found)

    conv, ffn = "feature_extractor.conv_layers.{}.conv.", "encoder.layers.{}.feed_forward.intermediate_dense."
    shape(conv.format(0) + "weight", 3)
    convs = [shape(conv.format(n) + "weight", 3) for n in range(count(conv + "weight"))]
    width, per_group, kernel = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1", 3)
    return {
        "conv_dims": tuple(dim for dim, _, _ in convs),
        "conv_kernels": tuple(taps for _, _, taps in convs),
        "conv_bias": named(conv.format(0) + "bias") in found,
        "width": width,
        "layers": count(ffn + "weight"),
        "ffn": shape(ffn.format(0) + "weight", 2)[0],
        "pos_conv_kernel": kernel,
        "pos_conv_groups": width // max(1, per_group),
    }


def make_config(where: object, shown: Mapping[str, Any], said: Mapping[str, Any]) -> HubertConfig:
    """HubertConfig from what the weights show (`fields_from_shapes`) and what the settings say.

    Raises:
        CheckpointError: the two contradict each other, or no HuBERT is like that.
    """
    wrong = [
        f"{name} {said[name]}, not {shown[name]}"
        for name in shown
        if said.get(name, shown[name]) != shown[name]
    ]
    if wrong:  # seen before a model of the wrong size is made, which could be of any size
        raise CheckpointError(
            f"{where}: weights and settings do not fit; the settings say {', '.join(wrong)}. Take both "
            "as they were published"
        )
    try:
        return HubertConfig(**{**shown, **said})
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: its settings describe no HuBERT: {error}") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a `.safetensors`, `.pt` or `.bin` file; tensors of pickled files are still `Stored`.

    Raises:
        CheckpointError: missing, damaged, or a pickle that is no table of tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing; copy the folder again")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and start[8:] != b"{":
        content = read_pickled(path)
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path}: holds a {type(content).__name__} and no weights; give another file"
            )
        return content
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: broken or truncated safetensors file ({error}); copy it again"
        ) from error


def load_tensors(table: Any) -> dict[str, Tensor]:
    """The tensors of a table, read now; other things in it are left out."""
    items = table.items() if isinstance(table, Mapping) else ()
    tensors = {str(name): value.load() if isinstance(value, Stored) else value for name, value in items}
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
