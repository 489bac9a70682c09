"""HuBERT (Hsu et al. 2021, https://arxiv.org/abs/2106.07447): modules and forward pass.

The forward pass follows the paper, with ordinary torch modules on a padded batch of waveforms and their
lengths. By default, padding never affects a result: the group norm computes its statistics over valid frames,
attention masks padding frames, and the positional convolution gets zeros in their place.

`jahubert.model.kernels` computes the same function faster on packed frames. The kernels are used wherever
possible; `kernels.usable` documents the exceptions.

Modules have the same names as in Hugging Face's `HubertModel`, so that each of the two classes can load the
state dict of the other.

Shapes: B utterances, T samples, S frames, C conv channels, D model width, H heads, E head width, K taps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

from jahubert.errors import AudioError, ConfigError
from jahubert.model import kernels
from jahubert.model.config import HubertConfig as HubertConfig
from jahubert.model.layers import (
    MaskedGroupNorm,
    WeightNormConv1d,
    length_mask,
    length_tensor,
    mean_square,
    scale_gradient,
    standardize,
)
from jahubert.model.precision import at_least_float32, autocast

if TYPE_CHECKING:
    from jahubert.model.kernels.packing import PackedShape, Packing


# Effect of padding on valid frames. "ignored" means no effect, and the other values reproduce other projects:
# "masked" includes padding in the group norm of base models (fairseq, torchaudio, and Hugging Face with an
# attention mask), and "unmasked" treats padding as audio (Hugging Face without an attention mask).
Padding = Literal["ignored", "masked", "unmasked"]


@dataclass(frozen=True)
class Encoded:
    """Output of the encoder. Frames after the end of an utterance are zero (unless `padding="unmasked"`)."""

    # Output of the last computed block; in pre-norm models without `last_layer`, after the closing norm
    hidden_BSD: Tensor
    n_frames_B: Tensor  # number of valid frames in each utterance, int64
    layers: dict[int, Tensor] = field(default_factory=dict)  # kept block outputs; 0 is the input of block 1
    # Mean square of the conv features of each utterance (float32), only in training
    conv_penalty_B: Tensor | None = None


register_pytree_node(  # torch.export requires this
    Encoded, lambda encoded: (list(vars(encoded).values()), None), lambda values, _: Encoded(*values)
)


class ConvLayer(nn.Module):
    """Convolution over time without padding, optionally with normalization, followed by GELU."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int, bias: bool, norm: str | None):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm = norm
        if norm == "group":
            self.layer_norm: nn.Module = MaskedGroupNorm(dim)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x_BCS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Apply the layer to `x_BCS`, where `valid_BS` marks the valid output frames."""
        x_BCS = self.conv(x_BCS)
        if self.norm == "group":
            x_BCS = self.layer_norm(x_BCS, None if valid_BS is None else valid_BS[:, None])
        elif self.norm == "layer":
            x_BCS = self.layer_norm(x_BCS.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x_BCS)


class ConvFrontEnd(nn.Module):
    """Convolutional encoder from 16 kHz waveforms to features at 50 Hz."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        dims = (1, *config.conv_dims)
        self.conv_layers = nn.ModuleList()
        for i, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True)):
            norm = config.conv_norm if i == 0 or config.conv_norm == "layer" else None
            self.conv_layers.append(ConvLayer(dims[i], dims[i + 1], kernel, stride, config.conv_bias, norm))

    def forward(self, wav_BT: Tensor, n_samples: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return features (B, S, C). If the batch is padded, `n_samples` contains the utterance lengths."""
        if kernels.usable(self):
            return kernels.front_end_padded(self, wav_BT, n_samples)
        x_BCS, valid_BS = wav_BT[:, None], None
        length_B = None if n_samples is None else length_tensor(n_samples, wav_BT.device)
        for layer in self.conv_layers:
            conv = cast(ConvLayer, layer).conv
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            if length_B is not None:
                length_B = (length_B - kernel) // stride + 1
                valid_BS = length_mask(length_B, (x_BCS.shape[2] - kernel) // stride + 1)
            x_BCS = layer(x_BCS, valid_BS)
        return x_BCS.transpose(1, 2)


class FeatureProjection(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dims[-1], eps=config.norm_eps)
        self.projection = nn.Linear(config.conv_dims[-1], config.width)
        self.dropout = nn.Dropout(config.input_dropout)

    def forward(self, x_BSC: Tensor) -> Tensor:
        out_BSD: Tensor = self.dropout(self.projection(self.layer_norm(x_BSC)))
        return out_BSD


class PositionalConv(nn.Module):
    """Relative positional embedding: a wide grouped convolution over the frames (wav2vec 2.0)."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        width, kernel = config.width, config.pos_conv_kernel
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.pos_conv_groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(cast(Tensor, conv.bias))
        self.conv = WeightNormConv1d(conv)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return embeddings (B, S, D) of `x_BSD`, which must be zero after the end of each utterance."""
        n_frames, lower = x_BSD.shape[1], torch.is_autocast_enabled(x_BSD.device.type)
        # Float32 is used, because oneDNN's bfloat16 kernel (torch 2.9.1 and 2.13.0, with AMX) returns wrong
        # results for groups of 4 to 14 channels.
        with autocast(torch.float32, x_BSD.device):
            y_BDS = self.conv((x_BSD.float() if lower else x_BSD).transpose(1, 2))
        # With an even kernel size, the output has one extra frame.
        return F.gelu(y_BDS[:, :, :n_frames]).transpose(1, 2).to(x_BSD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None) -> Tensor:
        q_BHSE, k_BHSE, v_BHSE = (
            project(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask_B11S = None if valid_BS is None else valid_BS[:, None, None]
        dropout = self.dropout if self.training else 0.0
        out_BHSE = kernels.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, mask_B11S, dropout)
        out_BSD: Tensor = self.out_proj(out_BHSE.transpose(1, 2).flatten(2))
        return out_BSD


class FeedForward(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.width, config.ffn)
        self.output_dense = nn.Linear(config.ffn, config.width)
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.output_dense(self.intermediate_dropout(F.gelu(self.intermediate_dense(x_BSD))))
        return out_BSD


class EncoderLayer(nn.Module):
    """Transformer block with layer norms after (post-norm) or before (pre-norm) its two parts."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Tensor | Packing | None) -> Tensor:
        """Apply the block to a padded batch (B, S, D), or to packed frames (N, D).

        Args:
            layout: the mask (B, S) of valid frames in a padded batch (None: all), or the `Packing` of packed
                frames.
        """
        if isinstance(layout, kernels.Packing):
            return kernels.encoder_layer(self, x, layout)
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.layer_norm(x), layout))
            x = x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        else:
            x = self.layer_norm(x + self.dropout(self.attention(x, layout)))
            x = self.final_layer_norm(x + self.dropout(self.feed_forward(x)))
        return x


class Encoder(nn.Module):
    """Positional convolution and Transformer blocks."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.pre_norm, self.layer_drop = config.pre_norm, config.layer_drop
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):  # the initialization is the same as in BERT
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        last_layer: int | None = None,
        keep_layers: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the final output, and the outputs of the blocks in `keep_layers`, keyed by block number."""
        if valid_BS is not None:
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0.0)
        x_BSD = x_BSD + self.pos_conv_embed(x_BSD)
        if not self.pre_norm:
            x_BSD = self.layer_norm(x_BSD)
        x_BSD, kept = self.transformer(self.dropout(x_BSD), valid_BS, last_layer, keep_layers)
        if self.pre_norm and last_layer is None:
            x_BSD = self.layer_norm(x_BSD)
        return x_BSD, kept

    def transformer(
        self, x: Tensor, layout: Tensor | Packing | None, last_layer: int | None, keep_layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Apply the blocks to a padded batch or to packed frames (see `EncoderLayer.forward`)."""
        kept = {0: x} if 0 in keep_layers else {}
        for number, layer in enumerate(self.layers[:last_layer], start=1):
            # Layer drop is drawn on the CPU, so that skipped blocks cost nothing and the GPU is not
            # synchronized.
            skipped = self.training and torch.rand((), device="cpu").item() < self.layer_drop
            if not skipped:
                x = layer(x, layout)
            if number in keep_layers:
                kept[number] = x
        return x, kept


class HubertModel(nn.Module):
    """HuBERT encoder from waveforms to frames: `model(wav_BT, n_samples_B) -> Encoded`."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        self.config = config
        self.feature_extractor = ConvFrontEnd(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = Encoder(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.width).uniform_())

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None) -> HubertModel:
        """Load the encoder of any model that `jahubert.load_bundle` opens (default: the built-in one).

        The encoder is in eval mode.
        """
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
        shape: PackedShape | None = None,
    ) -> Encoded:
        """Encode a padded batch of 16 kHz waveforms.

        Args:
            wav_BT: floating-point waveforms. Samples after `n_samples_B` are ignored.
            n_samples_B: number of valid samples in each utterance (default: all).
            mask_BS: mask of the frames that the mask embedding replaces before the encoder (True = masked).
            channel_mask_BD: mask of the channels that are set to zero in the whole utterance (True = zero).
            last_layer: number of the last block to compute, counted from 1 (0: none), whose output is
                `hidden_BSD`. By default, all blocks are computed, followed by the closing norm in pre-norm
                models.
            keep_layers: numbers of the blocks whose outputs are returned in `layers`; 0 is the input of block
                1.
            padding: effect of padding (see `Padding`), which can be changed for comparisons with other
                projects.
            shape: sizes to which the kernels pad the packed batch, so that all batches have equal shapes. It
                never changes a result.

        Raises:
            AudioError: the shape of the waveforms is not (B, T) with B > 0, an utterance is shorter than one
                frame, or lengths and waveforms do not match.
            ConfigError: a layer number is out of range, or the batch does not fit in `shape`.
        """
        keep_layers = set(keep_layers)
        self._check_layers(last_layer, keep_layers)
        n_samples = self._check_lengths(wav_BT, n_samples_B)
        if kernels.usable(self):
            return kernels.encode(
                self, wav_BT, n_samples, mask_BS, channel_mask_BD, last_layer, keep_layers, padding, shape
            )
        valid_BS = None
        if n_samples is None:
            features_BSC = self.feature_extractor(self.normalize(wav_BT))
            n_frames_B = torch.full(features_BSC.shape[:1], features_BSC.shape[1], device=wav_BT.device)
        else:
            n_samples_B = length_tensor(n_samples, wav_BT.device)
            wav_BT = self.normalize_padded(wav_BT, n_samples_B)
            features_BSC = self.feature_extractor(wav_BT, n_samples if padding == "ignored" else None)
            n_frames_B = self.config.grid.n_frames(n_samples_B)
            if padding != "unmasked":
                valid_BS = length_mask(n_frames_B, features_BSC.shape[1])
        features_BSC = scale_gradient(features_BSC, self.config.conv_grad_scale)
        penalty_B = mean_square(features_BSC, valid_BS) if self.training else None
        x_BSD = self.feature_projection(features_BSC)
        if mask_BS is not None:
            x_BSD = torch.where(mask_BS[..., None], self.masked_spec_embed.to(x_BSD.dtype), x_BSD)
        if channel_mask_BD is not None:
            x_BSD = x_BSD.masked_fill(channel_mask_BD[:, None], 0.0)
        x_BSD, layers = self.encoder(x_BSD, valid_BS, last_layer, keep_layers)
        if valid_BS is not None:
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0.0)
            layers = {number: x.masked_fill(~valid_BS[..., None], 0.0) for number, x in layers.items()}
        return Encoded(x_BSD, n_frames_B, layers, penalty_B)

    def _check_layers(self, last_layer: int | None, keep_layers: Collection[int]) -> None:
        top = self.config.layers if last_layer is None else last_layer
        if not 0 <= top <= self.config.layers:
            raise ConfigError(f"last_layer is {last_layer}, but must be between 0 and {self.config.layers}")
        wrong = [number for number in keep_layers if not 0 <= number <= top]
        if wrong:
            raise ConfigError(f"keep_layers contains {wrong}, but only layers 0 to {top} are computed")

    def _check_lengths(
        self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None
    ) -> Tensor | Sequence[int] | None:
        """Check the waveforms and lengths, and return the lengths, or None if there is no padding.

        The lengths are integers, except while torch traces a tensor of lengths.
        """
        if wav_BT.ndim != 2 or wav_BT.shape[0] == 0:
            raise AudioError(f"waveforms must be (batch >= 1, samples), but have shape {tuple(wav_BT.shape)}")
        batch, width = wav_BT.shape
        if isinstance(n_samples_B, Tensor) and kernels.is_tracing():
            return n_samples_B  # the values of a traced tensor are not known
        n_samples = [width] if n_samples_B is None else kernels.length_list(n_samples_B)
        if n_samples_B is not None and (len(n_samples) != batch or max(n_samples) > width):
            raise AudioError(f"lengths {n_samples} do not fit waveforms of shape {tuple(wav_BT.shape)}")
        shortest, window = min(n_samples), self.config.grid.window
        if shortest < window:
            raise AudioError(
                f"the length of utterance {n_samples.index(shortest)} of the batch is {shortest}, but one "
                f"frame needs {window} samples; drop the utterance or pad it with silence"
            )
        return None if n_samples_B is None or shortest == width else n_samples

    def normalize(self, wav: Tensor) -> Tensor:
        """Normalize a waveform to zero mean and unit variance if the model was trained on such waveforms."""
        if not self.config.normalize:
            return wav
        deviation = torch.sqrt(wav.var(-1, unbiased=False, keepdim=True) + self.config.normalize_eps)
        return (wav - wav.mean(-1, keepdim=True)) / deviation

    def normalize_padded(self, wav_BT: Tensor, n_samples_B: Tensor) -> Tensor:
        """Apply `normalize` to a padded batch, and set the samples after each utterance to zero."""
        valid_BT = length_mask(n_samples_B, wav_BT.shape[1])
        if not self.config.normalize:
            return wav_BT.masked_fill(~valid_BT, 0.0)
        # The sum of squares exceeds the range of float16.
        normed_BT = standardize(at_least_float32(wav_BT), valid_BT, self.config.normalize_eps)
        return normed_BT.to(wav_BT.dtype)
