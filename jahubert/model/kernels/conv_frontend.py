"""Convolutional front end on concatenated waveforms, computed with matrix products.

All waveforms of a batch are concatenated in (time, channel) order, each padded with zeros to whole tiles of
8 output frames. A convolution with stride `s` is then a matrix product over rows of `s` input frames, plus,
for the remaining taps, products over the same rows shifted by one or more rows. Rows that extend past the end
of an utterance contain arbitrary values. No valid frame depends on these rows, and they are dropped at the
end.

The group norm after the first layer (HuBERT base) scales every channel by its statistics over the whole
utterance. As the convolution is linear in its few taps, the statistics follow from the mean and covariance of
the taps, and convolution and norm become one product with separate weights for each utterance.

Shapes: B utterances, N frames of the concatenation, T tiles of R rows, C channels, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jahubert.frames import FrameGrid
from jahubert.model.kernels.double_backward import with_double_backward
from jahubert.model.kernels.indexing import BLOCK, concat_ranges, index_tensors
from jahubert.model.kernels.layer_norm import layer_norm
from jahubert.model.kernels.packing import TILE, PackedShape, Packing, padded_size
from jahubert.model.kernels.products import matmul_into
from jahubert.model.layers import length_list
from jahubert.model.precision import autocast_dtype

if TYPE_CHECKING:
    from jahubert.model.hubert import ConvFrontEnd, ConvLayer

TILES_AT_ONCE = 128  # number of tiles that are processed together when no gradient is needed
CACHED = 2**20  # number of values processed at a time on a CPU, so that they fit in its caches


def front_end_padded(stack: ConvFrontEnd, wav_BT: Tensor, n_samples: Sequence[int] | Tensor | None) -> Tensor:
    """Compute `ConvFrontEnd.forward`, with features (B, S, C) that are zero after each utterance."""
    convs = [cast("ConvLayer", layer).conv for layer in stack.conv_layers]
    grid = FrameGrid.from_convs([conv.kernel_size[0] for conv in convs], [conv.stride[0] for conv in convs])
    batch, width = wav_BT.shape
    lengths = [width] * batch if n_samples is None else length_list(n_samples)
    packing = Packing([grid.n_frames(n) for n in lengths], grid.n_frames(width), wav_BT.device)
    return packing.unpack(front_end(stack, wav_BT, lengths))


def front_end(
    stack: ConvFrontEnd, wav_BT: Tensor, lengths: Sequence[int], shape: PackedShape | None = None
) -> Tensor:
    """Compute packed features (N, C) for a padded batch of waveforms that have at least one frame each.

    Args:
        lengths: number of samples in each waveform. Samples after the end of a waveform are ignored.
        shape: sizes to which all tensors are padded (see `PackedShape`).
    """
    layers = [cast("ConvLayer", layer) for layer in stack.conv_layers]
    size = TILE * math.prod(layer.conv.stride[0] for layer in layers)  # number of samples per tile
    tiles = [-(-n // size) for n in lengths]
    n_tiles = padded_size(sum(tiles), shape and shape.n_tiles, "tiles", BLOCK // TILE)
    n_frames: list[Sequence[int]] = [lengths]  # length of each utterance before and after each layer
    for layer in layers:
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        n_frames.append([(n - kernel) // stride + 1 for n in n_frames[-1]])
    n_utterances = padded_size(len(lengths), shape and shape.n_utterances, "utterances")
    n_rows = padded_size(sum(n_frames[-1]), shape and shape.n_rows, "frames", BLOCK)
    filler = n_tiles - sum(tiles)  # tiles of zeros, read from beyond the end of the first utterance
    owner = np.append(np.repeat(np.arange(len(tiles)), tiles), np.zeros(filler, np.int64))
    position = np.append(concat_ranges(np.zeros(len(tiles)), tiles), np.full(filler, tiles[0]))
    first_row = TILE * (np.cumsum(tiles) - tiles)
    *of_tiles, valid_N = index_tensors(
        wav_BT.device,
        owner,
        position,
        np.asarray(lengths)[owner] - size * position,
        np.append(n_frames[1], np.ones(n_utterances - len(lengths))),
        np.append(concat_ranges(first_row, n_frames[-1]), np.zeros(n_rows - sum(n_frames[-1]))),
    )
    placement = _Tiles(*of_tiles)
    x_NC = _concatenate(wav_BT, size, placement)[:, None]
    x: Tensor | _Product = x_NC
    if layers[0].norm == "group":  # the statistics of the norm depend on the whole utterance
        x, layers = _group_normed(layers[0], x_NC, placement), layers[1:]
    blocks = [(x, TILE * n_tiles)] if torch.is_grad_enabled() else _blocks(x, n_tiles)
    x_NC = torch.cat([_run_layers(layers, block)[:n] for block, n in blocks])
    return F.gelu(x_NC.index_select(0, valid_N))


class _Tiles(NamedTuple):
    """Assignment of tiles to utterances."""

    owner_T: Tensor  # index of the utterance of each tile
    position_T: Tensor  # index of each tile within its utterance
    n_samples_T: Tensor  # number of samples from the start of a tile to the end of its utterance
    n_frames_B: Tensor  # number of valid output frames of the first layer in each utterance


def _concatenate(wav_BT: Tensor, size: int, tiles: _Tiles) -> Tensor:
    """Concatenate all waveforms as a tensor (N,), each padded with zeros to whole tiles of `size` samples."""
    padded_BT = F.pad(wav_BT, (0, -wav_BT.shape[1] % size))
    per_row = padded_BT.shape[1] // size
    index_T = per_row * tiles.owner_T + tiles.position_T.clamp(max=per_row - 1)
    wav_TS = padded_BT.reshape(-1, size).index_select(0, index_T)
    valid_TS = torch.arange(size, device=wav_BT.device) < tiles.n_samples_T[:, None]
    return torch.where(valid_TS, wav_TS, 0.0).flatten()


class _Product(NamedTuple):
    """Output of the first layer as two factors, because their product would be the largest activation."""

    taps_TRK: Tensor
    weight_TKC: Tensor


def _conv_layer(layer: ConvLayer, x: Tensor | _Product, gelu: bool) -> Tensor:
    """Apply the previous layer's GELU (if `gelu`), then this layer's convolution and any layer norm.

    The GELU of this layer is applied later.
    """
    dtype = autocast_dtype(layer.conv.weight)
    factors = x if isinstance(x, _Product) else (x.to(dtype), None)
    inputs, stride = (*factors, layer.conv.weight), layer.conv.stride[0]
    plain = partial(_gelu_conv, stride=stride, gelu=gelu)
    x_NC = with_double_backward(_GeluConv.apply(*inputs, stride, gelu), plain, *inputs)
    if layer.conv.bias is not None:
        x_NC = x_NC + layer.conv.bias.to(dtype)
    if layer.norm == "layer":
        x_NC = layer_norm(cast(nn.LayerNorm, layer.layer_norm), x_NC)
    return x_NC


def _group_normed(layer: ConvLayer, x_NC: Tensor, tiles: _Tiles) -> _Product:
    """Express convolution and group norm as the product of each tile and the weights of its utterance."""
    norm, kernel = cast(nn.GroupNorm, layer.layer_norm), layer.conv.weight.shape[2]
    dtype = autocast_dtype(layer.conv.weight)
    taps_TRK = _taps(x_NC, kernel, layer.conv.stride[0]).unflatten(0, (len(tiles.owner_T), -1))
    with torch.autocast(x_NC.device.type, enabled=False):
        mean_BK, covariance_BKK = _moments(taps_TRK, tiles)
        weight_CK = layer.conv.weight[:, 0].to(mean_BK.dtype)
        variance_BC = torch.einsum("ck,bkl,cl->bc", weight_CK, covariance_BKK, weight_CK)
        scale_BC = norm.weight * torch.rsqrt(variance_BC.clamp_min(0.0) + norm.eps)
        shift_BC = norm.bias - mean_BK @ weight_CK.T * scale_BC
        if layer.conv.bias is not None:  # the norm cancels the bias, but a zero gradient is still required
            shift_BC = shift_BC + 0.0 * layer.conv.bias
        weight_BKC = torch.cat([weight_CK.T * scale_BC[:, None], shift_BC[:, None]], dim=1)
        taps_TRK = F.pad(taps_TRK, (0, 1), value=1.0)  # the column of ones is multiplied by the shift
        if x_NC.device.type != "cpu":  # a GPU multiplies 16 taps faster than 11
            weight_BKC = F.pad(weight_BKC, (0, 0, 0, -(kernel + 1) % 8))
            taps_TRK = F.pad(taps_TRK, (0, -(kernel + 1) % 8))
        # The precision is reduced after `index_select`, whose gradient sums over the tiles of an utterance.
        weight_BKC = weight_BKC.to(torch.promote_types(dtype, torch.float32))
        weight_TKC = weight_BKC.index_select(0, tiles.owner_T)
        return _Product(taps_TRK.to(dtype), weight_TKC.to(dtype))


def _run_layers(layers: Sequence[ConvLayer], x: Tensor | _Product) -> Tensor:
    """Apply `layers` to a waveform, or to the `_Product` of a group-normed layer that precedes them."""
    for i, layer in enumerate(layers):
        x = _conv_layer(layer, x, gelu=i > 0 or isinstance(x, _Product))
    return torch.bmm(*x).flatten(0, 1) if isinstance(x, _Product) else x


def _blocks(x: Tensor | _Product, n_tiles: int) -> Iterator[tuple[Tensor | _Product, int]]:
    """Yield blocks for up to `TILES_AT_ONCE` tiles of output, each with its number of output frames.

    If all tiles were processed at once, the first layers would need a hundred times the memory of the output.
    Each block contains one tile more than its output, because the last output frames extend into this tile.
    """
    inputs: Sequence[Tensor] = x if isinstance(x, _Product) else [x.unflatten(0, (n_tiles, -1))]
    tensors = [torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) for tensor in inputs]
    for start in range(0, n_tiles, TILES_AT_ONCE):
        stop = min(start + TILES_AT_ONCE, n_tiles)
        parts = [tensor[start : stop + 1] for tensor in tensors]
        block = _Product(*parts) if isinstance(x, _Product) else parts[0].flatten(0, 1)
        yield block, (stop - start) * TILE


def _moments(taps_TRK: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Compute the mean (B, K) and covariance (B, K, K) of the taps over the valid rows of each utterance.

    The sums are in float64 if the device supports it, because a channel may pass only a small part of the
    power of its taps.
    """
    exact = torch.float32 if taps_TRK.device.type == "mps" else torch.float64  # MPS does not support float64
    count_B = tiles.n_frames_B.to(exact)
    row_TR = tiles.position_T[:, None] * taps_TRK.shape[1] + torch.arange(
        taps_TRK.shape[1], device=taps_TRK.device
    )
    valid_TR = row_TR < tiles.n_frames_B[tiles.owner_T][:, None]
    taps_TRK = torch.where(valid_TR[..., None], taps_TRK, 0.0).to(exact)
    sum_TK, square_TKK = taps_TRK.sum(1), taps_TRK.transpose(1, 2) @ taps_TRK
    n, kernel = len(count_B), taps_TRK.shape[2]
    sum_BK = sum_TK.new_zeros(n, kernel).index_add(0, tiles.owner_T, sum_TK)
    square_BKK = sum_TK.new_zeros(n, kernel, kernel).index_add(0, tiles.owner_T, square_TKK)
    mean_BK = sum_BK / count_B[:, None]
    covariance_BKK = square_BKK / count_B[:, None, None] - mean_BK[:, :, None] * mean_BK[:, None, :]
    return mean_BK, covariance_BKK


def _taps(x_NC: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the samples (N / stride, K) in the receptive field of each output frame of the first layer."""
    rows = x_NC.view(-1, stride)
    shifts = -(-kernel // stride)
    padded = F.pad(rows, (0, 0, 0, shifts - 1))
    return torch.cat([padded[j : j + len(rows)] for j in range(shifts)], dim=1)[:, :kernel]


def _gelu_conv(x: Tensor, factor: Tensor | None, weight_OCK: Tensor, stride: int, gelu: bool) -> Tensor:
    """Apply GELU, if `gelu`, and a strided convolution to x (N, C), or to the product x @ factor.

    This plain version is used for second derivatives; `_GeluConv` is faster.
    """
    _, channels, kernel = weight_OCK.shape
    x_NC = x if factor is None else torch.bmm(x, factor).view(-1, channels)
    x_CN = F.pad((F.gelu(x_NC) if gelu else x_NC).T, (0, max(0, kernel - stride)))
    return F.conv1d(x_CN[None], weight_OCK.to(x.dtype), stride=stride)[0].T


class _GeluConv(torch.autograd.Function):
    """`_gelu_conv` implemented with matrix products, as the module docstring describes.

    Only x, `factor` (if given) and the weights are stored for the backward pass. On a CPU, only some of the
    rows are processed at a time, so that intermediate results remain in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor | None, weight_OCK: Tensor, stride: int, gelu: bool
    ) -> Tensor:
        outs, channels = weight_OCK.shape[:2]
        # The weights are split by input row: taps in the same row as the output, in the next row, and so on.
        taps = weight_OCK.to(x.dtype).permute(2, 1, 0).reshape(-1, outs).split(stride * channels)
        ctx.shape, ctx.width, ctx.gelu = weight_OCK.shape, stride * channels, gelu
        n, parts = _parts(x, factor, ctx.width)
        y_NO = x.new_empty(n, outs)
        for start, stop in parts:
            rows = _rows(x, factor, ctx.width, start, stop)
            rows = F.gelu(rows) if gelu else rows
            for j, tap in enumerate(taps):  # row i contributes to outputs i, i - 1, ...
                begin = max(start, j)
                matmul_into(y_NO[begin - j : stop - j], rows[begin - start :, : len(tap)], tap, add=j > 0)
        ctx.save_for_backward(x, factor, *taps)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, *taps = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        needs = any(ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_factor = None if factor is None else torch.empty_like(factor)
        grad_taps = [tap.new_zeros(tap.shape, dtype=torch.float32) for tap in taps]
        for start, stop in _parts(x, factor, ctx.width)[1]:
            rows = _rows(x, factor, ctx.width, start, stop)
            active = F.gelu(rows) if ctx.gelu else rows
            # The first product overwrites whole rows, unless the kernel is narrower than the stride.
            grad_rows = torch.empty_like(rows) if len(taps[0]) == ctx.width else torch.zeros_like(rows)
            for j, (tap, grad_tap) in enumerate(zip(taps, grad_taps, strict=True)):
                begin = max(start, j)
                grad = grad_NO[begin - j : stop - j]
                _add_product(grad_tap, active[begin - start :, : len(tap)].T, grad)
                if needs:
                    matmul_into(grad_rows[begin - start :, : len(tap)], grad, tap.T, add=j > 0)
            if ctx.gelu and needs:
                torch.ops.aten.gelu_backward.grad_input(grad_rows, rows, grad_input=grad_rows)
            if factor is not None and grad_factor is not None:
                tiles = _tiles(x, factor, ctx.width, start, stop)
                grad_TRC = grad_rows.view(-1, x.shape[1], factor.shape[2])
                torch.bmm(x[tiles].transpose(1, 2), grad_TRC, out=grad_factor[tiles])
                if grad_x is not None:
                    torch.bmm(grad_TRC, factor[tiles].transpose(1, 2), out=grad_x[tiles])
            elif grad_x is not None:
                grad_x.view(-1, ctx.width)[start:stop] = grad_rows
        outs, channels, kernel = ctx.shape
        grad_OCK = torch.cat(grad_taps).view(kernel, channels, outs).permute(2, 1, 0)
        return grad_x, grad_factor, grad_OCK, None, None


def _tile(x: Tensor, factor: Tensor, width: int) -> int:
    """Return the number of rows of `width` values per tile of a product."""
    return x.shape[1] * factor.shape[2] // width


def _tiles(x: Tensor, factor: Tensor, width: int, start: int, stop: int) -> slice:
    return slice(start // _tile(x, factor, width), stop // _tile(x, factor, width))


def _rows(x: Tensor, factor: Tensor | None, width: int, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` of the input, with `width` values each."""
    if factor is None:
        return x.view(-1, width)[start:stop]
    tiles = _tiles(x, factor, width, start, stop)
    return torch.bmm(x[tiles], factor[tiles]).view(-1, width)


def _parts(x: Tensor, factor: Tensor | None, width: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of rows and the row ranges to process in turn, which on a CPU fit in the cache."""
    unit = BLOCK if factor is None else _tile(x, factor, width)
    n = x.numel() // width if factor is None else len(x) * unit
    step = max(1, CACHED // (width * unit)) * unit if x.device.type == "cpu" else n
    return n, [(start, min(start + step, n)) for start in range(0, n, step)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which is float32."""
    if a.dtype is total.dtype:
        matmul_into(total, a, b, add=True)
    else:
        total.add_(a @ b)
