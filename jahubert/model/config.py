"""Configuration of a HuBERT model: sizes and regularization."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jahubert.errors import ConfigError, quote
from jahubert.frames import FrameGrid


@dataclass(frozen=True)
class HubertConfig:
    """Configuration of a HuBERT model. The defaults are those of the BASE model in the paper (Table I)."""

    conv_dims: tuple[int, ...] = (512,) * 7  # channels of each conv layer
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)  # kernel size of each conv layer
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)  # stride of each conv layer
    conv_bias: bool = False  # whether the conv layers have biases
    # group: group norm with one group per channel, only after the first conv layer; layer: layer norm after
    # every conv layer
    conv_norm: Literal["group", "layer"] = "group"
    width: int = 768  # model dimension of the Transformer
    layers: int = 12  # number of Transformer blocks
    heads: int = 12  # number of attention heads per block
    ffn: int = 3072  # inner dimension of the feed-forward sublayers
    pre_norm: bool = False  # whether a layer norm precedes each sublayer (large, xlarge) or follows it (base)
    pos_conv_kernel: int = 128  # kernel size of the positional convolution in frames
    pos_conv_groups: int = 16  # number of channel groups in the positional convolution
    norm_eps: float = 1e-5  # epsilon of all norms except those in the conv layers, which use 1e-5
    normalize: bool = False  # whether each waveform is normalized to zero mean and unit variance
    # Epsilon that is added to the variance of the waveform: 1e-7 for weights from Hugging Face, 1e-5 for
    # weights from fairseq and torchaudio. As the value belongs to the weights, it is not recorded as a
    # setting of a stage.
    normalize_eps: float = field(default=1e-7, metadata={"runtime": True})
    dropout: float = 0.1  # dropout after each sublayer and before the first block
    attention_dropout: float = 0.1  # dropout on the attention weights
    activation_dropout: float = 0.0  # dropout inside the feed-forward sublayers
    input_dropout: float = 0.1  # dropout on the projected conv features
    layer_drop: float = 0.05  # probability that a block is skipped in training
    conv_grad_scale: float = 0.1  # factor for the gradient that enters the conv layers

    def __post_init__(self) -> None:
        errors = []
        n_convs = len(self.conv_dims), len(self.conv_kernels), len(self.conv_strides)
        if min(n_convs) == 0 or len(set(n_convs)) > 1:
            errors.append(
                "conv_dims, conv_kernels and conv_strides must have one entry per conv layer, but their "
                f"lengths are {n_convs}"
            )
        for name in ("heads", "pos_conv_groups"):
            parts = getattr(self, name)
            if parts < 1 or self.width % parts:
                errors.append(f"{name} is {parts}, but must be a positive divisor of width {self.width}")
        if self.conv_norm not in ("group", "layer"):
            errors.append(f"conv_norm is {quote(self.conv_norm)}, but must be 'group' or 'layer'")
        for name in ("layers", "width", "ffn", "pos_conv_kernel", *_CONV_FIELDS):
            value = getattr(self, name)
            if min(value if name in _CONV_FIELDS else [value], default=1) < 1:
                errors.append(f"{name} is {value}, but must be positive")
        for name in ("norm_eps", "normalize_eps", "conv_grad_scale"):
            if not getattr(self, name) >= 0:
                errors.append(f"{name} is {getattr(self, name)}, but must be at least 0")
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                errors.append(f"{name} is {getattr(self, name)}, but must be in [0, 1)")
        if errors:
            raise ConfigError("HubertConfig: " + "; ".join(errors))

    @property
    def grid(self) -> FrameGrid:
        """Mapping between output frames and samples."""
        return FrameGrid.from_convs(self.conv_kernels, self.conv_strides)

    @classmethod
    def base(cls, **changes: Any) -> HubertConfig:
        """Return the BASE configuration: 94 M parameters, 12 blocks of width 768."""
        return replace(cls(), **changes)

    @classmethod
    def large(cls, **changes: Any) -> HubertConfig:
        """Return the LARGE configuration: 315 M parameters, 24 pre-norm blocks of width 1024, no dropout."""
        return replace(cls(**_LARGE), **changes)

    @classmethod
    def xlarge(cls, **changes: Any) -> HubertConfig:
        """Return the X-LARGE configuration: like LARGE, but 962 M parameters and 48 blocks of width 1280."""
        return replace(cls(**_LARGE | {"width": 1280, "layers": 48, "ffn": 5120}), **changes)


# Fields that change only the training of a network, or, in the case of normalize_eps, belong to its weights.
TRAINING_FIELDS = (
    "normalize_eps", "dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop",
    "conv_grad_scale",
)  # fmt: skip
_CONV_FIELDS = ("conv_dims", "conv_kernels", "conv_strides")
_LARGE: dict[str, Any] = {
    "conv_norm": "layer",
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "ffn": 4096,
    "pre_norm": True,
    "normalize": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "input_dropout": 0.0,
    "layer_drop": 0.0,
    "conv_grad_scale": 1.0,
}
