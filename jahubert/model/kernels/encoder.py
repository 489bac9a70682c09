"""Forward pass of the model and of a Transformer block on packed frames.

Shapes: B utterances, S frames of the padded batch, N packed frames, C conv channels, D model width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.model.kernels.attention import fused_kernels, self_attention
from jahubert.model.kernels.conv_frontend import front_end
from jahubert.model.kernels.dropout import dropout
from jahubert.model.kernels.feed_forward import feed_forward
from jahubert.model.kernels.indexing import index_tensors, length_list
from jahubert.model.kernels.layer_norm import layer_norm, residual_norm
from jahubert.model.kernels.packing import PackedShape, Packing
from jahubert.model.kernels.positional_conv import positional_conv
from jahubert.model.kernels.weights import linear

if TYPE_CHECKING:
    from jahubert.model.hubert import Encoded, EncoderLayer, HubertModel, Padding


def encode(
    model: HubertModel,
    wav_BT: Tensor,
    n_samples: Sequence[int] | Tensor | None,
    mask_BS: Tensor | None,
    channel_mask_BD: Tensor | None,
    last_layer: int | None,
    keep_layers: Collection[int],
    padding: Padding,
    shape: PackedShape | None,
) -> Encoded:
    """Compute `HubertModel.forward` on packed frames. `n_samples` contains the lengths in a padded batch."""
    from jahubert.model.hubert import Encoded
    from jahubert.model.layers import scale_gradient

    config, device = model.config, wav_BT.device
    batch, width = wav_BT.shape
    lengths = [width] * batch if n_samples is None else length_list(n_samples)
    n_frames, padded_frames = [config.grid.n_frames(n) for n in lengths], config.grid.n_frames(width)
    conv_lengths = lengths if padding == "ignored" else [width] * batch
    if config.normalize or padding != "ignored":
        wav_BT = normalized(model, wav_BT, lengths)
    visible = [padded_frames] * batch if padding == "unmasked" else n_frames
    packing = Packing(visible, padded_frames, device, shape)
    n_frames_B, visible_B = index_tensors(device, n_frames, visible)
    features_NC = front_end(model.feature_extractor, wav_BT, conv_lengths, shape)
    if padding == "masked":
        features_NC = features_NC.index_select(0, packing.index_N)
    features_NC = scale_gradient(features_NC, config.conv_grad_scale)
    penalty_B = None
    if model.training:
        square_N1 = features_NC.float().square().mean(1, keepdim=True)
        penalty_B = packing.unpack(square_N1).sum((1, 2)) / visible_B

    projection = model.feature_projection
    x_ND = linear(layer_norm(projection.layer_norm, features_NC), projection.projection)
    x_ND = dropout(projection.dropout, x_ND)
    if mask_BS is not None:
        x_ND = torch.where(packing.pack(mask_BS[..., None]), model.masked_spec_embed.to(x_ND.dtype), x_ND)
    if channel_mask_BD is not None:
        mask_BSD = channel_mask_BD[:, None].expand(-1, packing.width, -1)
        x_ND = x_ND.masked_fill(packing.pack(mask_BSD), 0.0)

    encoder = model.encoder
    with fused_kernels(device):
        x_ND = x_ND + positional_conv(encoder.pos_conv_embed, x_ND, packing)
        if not encoder.pre_norm:
            x_ND = layer_norm(encoder.layer_norm, x_ND)
        x_ND = dropout(encoder.dropout, x_ND)
        x_ND, kept = encoder.transformer(x_ND, packing, last_layer, keep_layers)
        if encoder.pre_norm and last_layer is None:
            x_ND = layer_norm(encoder.layer_norm, x_ND)
    layers = {number: packing.unpack(x) for number, x in kept.items()}
    return Encoded(packing.unpack(x_ND), n_frames_B, layers, penalty_B)


def normalized(model: HubertModel, wav_BT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Apply `HubertModel.normalize` to each waveform, and set the samples after its end to zero."""
    if wav_BT.device.type != "cpu":
        (n_samples_B,) = index_tensors(wav_BT.device, lengths)
        return model.normalize_padded(wav_BT, n_samples_B)
    # A CPU computes one waveform at a time faster than the batch, because it fits in the cache.
    wavs = [model.normalize(wav_T[:n]) for wav_T, n in zip(wav_BT, lengths, strict=True)]
    return torch.stack([F.pad(wav_T, (0, wav_BT.shape[1] - len(wav_T))) for wav_T in wavs])


def encoder_layer(block: EncoderLayer, x_ND: Tensor, packing: Packing) -> Tensor:
    """Compute `EncoderLayer.forward` on packed frames."""
    attention, ffn = block.attention, block.feed_forward
    first_norm, second_norm = block.layer_norm, block.final_layer_norm
    if block.pre_norm:
        attended_ND = self_attention(attention, layer_norm(first_norm, x_ND), packing)
        normed_ND, x_ND = residual_norm(second_norm, block.dropout, attended_ND, x_ND)
        x_ND = x_ND + dropout(block.dropout, feed_forward(ffn, normed_ND))
    else:
        attended_ND = self_attention(attention, x_ND, packing)
        x_ND, _ = residual_norm(first_norm, block.dropout, attended_ND, x_ND)
        x_ND, _ = residual_norm(second_norm, block.dropout, feed_forward(ffn, x_ND), x_ND)
    return x_ND
