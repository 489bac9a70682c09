"""HuBERT: a convolutional front end and a Transformer encoder (Hsu et al. 2021, arXiv 2106.07447).

One `HubertConfig` gives base, large, xlarge and any smaller size. Modules carry the names of Hugging
Face's `HubertModel`, so a state dict of either loads into the other without renaming.

Padding never enters a result. The convolutions see the waveforms without it (`frontend`), frames behind
an utterance are zero for the positional convolution, and the Transformer works on the valid frames of
the batch laid end to end (`Packing`), so no layer spends time on padding and attention never crosses
utterances.

Shapes: B batch, T samples, S frames, C conv channels, D width, N valid frames of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.errors import AudioError, ConfigError
from jahubert.frames import FrameGrid
from jahubert.model.kernels.conv_frontend import ConvFrontEnd
from jahubert.model.kernels.dropout import Dropout
from jahubert.model.kernels.indexing import index_tensors
from jahubert.model.kernels.positional_conv import PositionalConv
from jahubert.model.packing import Packing, fused_kernels
from jahubert.model.precision import autocast_dtype


@dataclass(frozen=True)
class HubertConfig:
    """Sizes and regularisation; the defaults are the paper's BASE (Table I, fairseq's base yaml)."""

    conv_dims: tuple[int, ...] = (512,) * 7  # channels of each conv layer
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)  # samples, then frames of the layer below
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"  # group: one norm, per channel, after the first conv
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072  # inner width of the feed-forward blocks
    pre_norm: bool = False  # layer norm before each block (large, xlarge) or after it (base)
    pos_conv_kernel: int = 128  # frames
    pos_conv_groups: int = 16
    norm_eps: float = 1e-5
    normalize: bool = False  # waveforms to zero mean and unit variance, per utterance
    # On that variance: Hugging Face 1e-7, fairseq and torchaudio 1e-5. It belongs to weights from elsewhere
    # and is no setting of a training, so the records of stages leave it out ("free").
    normalize_eps: float = field(default=1e-7, metadata={"free": True})
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1  # on the projected conv features
    layer_drop: float = 0.05  # chance that a block is skipped in training
    conv_grad_scale: float = 0.1  # gradient into the conv stack is multiplied by this

    def __post_init__(self) -> None:
        wrong = []
        if not len(self.conv_dims) == len(self.conv_kernels) == len(self.conv_strides) > 0:
            wrong.append("conv_dims, conv_kernels and conv_strides must have one entry a layer")
        for name in ("heads", "pos_conv_groups"):
            if (parts := getattr(self, name)) < 1 or self.width % parts:
                wrong.append(f"width {self.width} is not divisible by {name} {parts}")
        if self.conv_norm not in ("group", "layer"):
            wrong.append(f"conv_norm is {self.conv_norm!r}, but must be 'group' or 'layer'")
        sizes = (*self.conv_dims, *self.conv_kernels, *self.conv_strides)
        if min(self.layers, self.width, self.ffn, self.pos_conv_kernel, *sizes) < 1:
            wrong.append(
                "layers, width, ffn, pos_conv_kernel, conv_dims, _kernels and _strides must be positive"
            )
        if not min(self.norm_eps, self.normalize_eps, self.conv_grad_scale) >= 0:
            wrong.append("norm_eps, normalize_eps and conv_grad_scale must be at least 0")
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, but must be in [0, 1)")
        if wrong:
            raise ConfigError("HubertConfig: " + "; ".join(wrong))

    @property
    def grid(self) -> FrameGrid:
        """Which samples each output frame sees."""
        return FrameGrid.from_convs(self.conv_kernels, self.conv_strides)

    @classmethod
    def base(cls, **changes) -> HubertConfig:
        """95 M parameters, 12 blocks of width 768."""
        return replace(cls(), **changes)

    @classmethod
    def large(cls, **changes) -> HubertConfig:
        """316 M parameters, 24 blocks of width 1024, pre-norm, no dropout."""
        return replace(cls(**_LARGE), **changes)

    @classmethod
    def xlarge(cls, **changes) -> HubertConfig:
        """962 M parameters, 48 blocks of width 1280, pre-norm, no dropout."""
        return replace(cls(**_LARGE | {"width": 1280, "layers": 48, "ffn": 5120}), **changes)


_LARGE: dict = {
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


# What the zeros behind the utterances of a padded batch may do. Nothing ("ignored"), unless a peer is to be
# met: "masked" counts them in the group norm of base models, as fairseq and torchaudio do, and Hugging Face
# with an attention mask; "unmasked" takes them for audio, as Hugging Face does without one.
Padding = Literal["ignored", "masked", "unmasked"]


@dataclass(frozen=True)
class Encoded:
    """What the encoder says about a batch; frames behind an utterance are zero (but see `Padding`)."""

    hidden_BSD: Tensor  # output of the last computed block (with the closing norm if nothing was cut off)
    n_frames_B: Tensor  # valid frames of each row, int64
    layers: dict[int, Tensor] = field(default_factory=dict)  # kept block outputs; 0 is the input of block 1
    conv_penalty: Tensor | None = None  # mean square of the conv features, float32 scalar


class FeatureProjection(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dims[-1], eps=config.norm_eps)
        self.projection = nn.Linear(config.conv_dims[-1], config.width)
        self.dropout = Dropout(config.input_dropout)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.dropout(self.projection(self.layer_norm(x_NC)))


class Attention(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        x_ND = x_ND.to(autocast_dtype(x_ND))  # once, not by each of the three products
        q, k, v = (p(x_ND).unflatten(1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packing.attend(q, k, v, self.dropout if self.training else 0.0).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.width, config.ffn)
        self.output_dense = nn.Linear(config.ffn, config.width)
        self.intermediate_dropout = Dropout(config.activation_dropout)

    def forward(self, x_ND: Tensor) -> Tensor:
        inner = self.intermediate_dense(x_ND)
        if torch.is_grad_enabled() and not (self.training and self.intermediate_dropout.p):
            return _GeluLinear.apply(inner, self.output_dense.weight, self.output_dense.bias)
        return self.output_dense(self.intermediate_dropout(F.gelu(inner)))


class _GeluLinear(torch.autograd.Function):
    """Linear layer of GELU(x), which is computed again for backward: a third of what a block would keep."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_weight = grad.T @ F.gelu(x)
        grad_x = grad @ weight
        torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)
        return grad_x, grad_weight, grad.sum(0)


class EncoderLayer(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        if self.pre_norm:
            x_ND = x_ND + self.dropout(self.attention(self.layer_norm(x_ND), packing))
            return x_ND + self.dropout(self.feed_forward(self.final_layer_norm(x_ND)))
        x_ND = self.layer_norm(x_ND + self.dropout(self.attention(x_ND, packing)))
        return self.final_layer_norm(x_ND + self.dropout(self.feed_forward(x_ND)))


class Encoder(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.pre_norm, self.layer_drop = config.pre_norm, config.layer_drop
        self.pos_conv_embed = PositionalConv(config.width, config.pos_conv_kernel, config.pos_conv_groups)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):  # BERT's initialisation
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, x_ND: Tensor, packing: Packing, last_layer: int | None, keep_layers: Iterable[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden frames of the last computed block, and those of the kept blocks, packed."""
        keep = set(keep_layers)
        x_ND = x_ND + self.pos_conv_embed(x_ND, packing)
        if not self.pre_norm:
            x_ND = self.layer_norm(x_ND)
        x_ND = self.dropout(x_ND)
        kept = {0: x_ND} if 0 in keep else {}
        for number, layer in enumerate(self.layers[:last_layer], start=1):
            # Drawn on the CPU, so that a skipped block costs nothing and no device has to be asked.
            if not (self.training and torch.rand(()).item() < self.layer_drop):
                x_ND = layer(x_ND, packing)
            if number in keep:
                kept[number] = x_ND
        if self.pre_norm and last_layer is None:
            x_ND = self.layer_norm(x_ND)
        return x_ND, kept


class HubertModel(nn.Module):
    """Waveforms in, frames out: `model(wav_BT, n_samples_B) -> Encoded`."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.config = config
        self.feature_extractor = ConvFrontEnd(
            config.conv_dims,
            config.conv_kernels,
            config.conv_strides,
            bias=config.conv_bias,
            norm=config.conv_norm,
        )
        self.feature_projection = FeatureProjection(config)
        self.encoder = Encoder(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.width).uniform_())

    @classmethod
    def from_pretrained(cls, source) -> HubertModel:
        """The encoder of anything that `jahubert.formats.bundle.load_bundle` opens, in eval mode."""
        from jahubert.formats.bundle import load_bundle

        return load_bundle(source).model

    def forward(
        self,
        wav_BT: Tensor,
        n_samples_B: Tensor | Sequence[int] | None = None,
        *,
        mask_BS: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
        last_layer: int | None = None,
        keep_layers: Iterable[int] = (),
        padding: Padding = "ignored",
    ) -> Encoded:
        """Encode a padded batch of 16 kHz waveforms.

        Args:
            wav_BT: float waveforms; what stands behind `n_samples_B` is ignored.
            n_samples_B: valid samples of each row (default: all).
            mask_BS: frames replaced by the mask embedding before the encoder (True = masked).
            channel_mask_BD: channels set to zero over the whole utterance (True = zero).
            last_layer: stop after this block, counted from 1; its output, after residual and norm,
                is `hidden_BSD`. Default: all blocks and, for pre-norm models, the closing norm.
            keep_layers: block numbers whose outputs are wanted in `layers`; 0 is the input of block 1.
            padding: for comparison only, what other projects let padding do (see `Padding`).

        Raises:
            AudioError: a row is shorter than one frame.
            ConfigError: a layer number that the model does not have.
        """
        self._check_layers(last_layer, keep_layers)
        wavs, width = self._rows(wav_BT, n_samples_B), wav_BT.shape[1]
        frames = [self.config.grid.n_frames(len(wav_T)) for wav_T in wavs]
        if padding != "ignored":
            wavs = [F.pad(wav_T, (0, width - len(wav_T))) for wav_T in wavs]
        seen = [self.config.grid.n_frames(width)] * len(frames) if padding == "unmasked" else frames
        packing = Packing(seen, self.config.grid.n_frames(width), wav_BT.device)
        (n_frames_B,) = index_tensors(wav_BT.device, frames)
        features_NC = self.feature_extractor(wavs)
        if padding == "masked":
            features_NC = features_NC.index_select(0, packing.index_N)
        scale = self.config.conv_grad_scale
        if scale != 1.0 and features_NC.requires_grad:
            features_NC = features_NC * scale + features_NC.detach() * (1 - scale)
        penalty = features_NC[: packing.n_valid].float().pow(2).mean() if self.training else None
        x_ND = self.feature_projection(features_NC)
        if mask_BS is not None:
            x_ND = torch.where(packing.pack(mask_BS[..., None]), self.masked_spec_embed.to(x_ND.dtype), x_ND)
        if channel_mask_BD is not None:
            mask_BSD = channel_mask_BD[:, None].expand(-1, packing.width, -1)
            x_ND = x_ND.masked_fill(packing.pack(mask_BSD), 0.0)
        with fused_kernels(x_ND.device):
            x_ND, kept = self.encoder(x_ND, packing, last_layer, keep_layers)
        return Encoded(
            hidden_BSD=packing.unpack(x_ND),
            n_frames_B=n_frames_B,
            layers={number: packing.unpack(x) for number, x in kept.items()},
            conv_penalty=penalty,
        )

    def _check_layers(self, last_layer: int | None, keep_layers: Iterable[int]) -> None:
        top = self.config.layers if last_layer is None else last_layer
        if not 0 <= top <= self.config.layers:
            raise ConfigError(
                f"layer {last_layer} was asked for, but the model has blocks 1 to {self.config.layers}"
            )
        wrong = [number for number in keep_layers if not 0 <= number <= top]
        if wrong:
            raise ConfigError(f"layers {wrong} were asked for, but only 0 to {top} are computed")

    def _rows(self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None) -> list[Tensor]:
        """Each utterance without its padding, normalised if the model wants it; checks the lengths."""
        if wav_BT.ndim != 2:
            raise AudioError(f"waveforms must be (batch, samples), but have shape {tuple(wav_BT.shape)}")
        batch, width = wav_BT.shape
        lengths = [width] * batch if n_samples_B is None else [int(n) for n in n_samples_B]
        shortest, window = min(lengths), self.config.grid.window
        if shortest < window:
            raise AudioError(
                f"utterance {lengths.index(shortest)} of the batch has {shortest} samples, but one frame "
                f"needs {window}; drop it or pad it with silence"
            )
        if max(lengths) > width or len(lengths) != batch:
            raise AudioError(f"lengths {lengths} do not fit waveforms of shape {tuple(wav_BT.shape)}")
        rows = [wav_T[:n] for wav_T, n in zip(wav_BT, lengths, strict=True)]
        eps = self.config.normalize_eps
        return [_normalize(wav_T, eps) for wav_T in rows] if self.config.normalize else rows


def _normalize(wav_T: Tensor, eps: float) -> Tensor:
    """Zero mean, unit variance."""
    return (wav_T - wav_T.mean()) / torch.sqrt(wav_T.var(unbiased=False) + eps)
