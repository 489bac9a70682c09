"""Convolutional front end on concatenated waveforms, computed with matrix products.

All waveforms of a batch are concatenated in (time, channel) order, each padded with zeros to whole tiles of
8 output frames. A convolution with stride `s` is then a matrix product over rows of `s` input frames, plus,
for the remaining taps, products over the same rows shifted by one or more rows. Rows that extend past the end
of an utterance contain arbitrary values. No valid frame depends on these rows, and they are dropped at the
end.

The group norm after the first layer (HuBERT base) scales every channel by its statistics over the whole
utterance. As the convolution is linear in its few taps, the statistics follow from the mean and covariance of
the taps, and convolution and norm become one product with separate weights for each utterance.

Shapes: B utterances, T samples, N frames of the concatenation, M tiles of R rows, C channels, O output
channels, K taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jahubert.frames import FrameGrid
from jahubert.model.kernels.double_backward import with_double_backward
from jahubert.model.kernels.gelu import gelu_backward
from jahubert.model.kernels.indexing import BLOCK, concat_ranges, index_tensors, length_list
from jahubert.model.kernels.layer_norm import layer_norm
from jahubert.model.kernels.packing import TILE, PackedShape, Packing, padded_size
from jahubert.model.kernels.products import matmul_into
from jahubert.model.precision import autocast_dtype

if TYPE_CHECKING:
    from jahubert.model.hubert import ConvFrontEnd, ConvLayer

TILES_AT_ONCE = 128  # number of tiles that are processed together when no gradient is needed
CACHED = 2**20  # number of values processed at a time on a CPU, so that they fit in its caches


def front_end_padded(stack: ConvFrontEnd, wav_BT: Tensor, n_samples: Sequence[int] | Tensor | None) -> Tensor:
    """Compute `ConvFrontEnd.forward`, with features (B, S, C) that are zero after each utterance."""
    grid = _frame_grid(cast("ConvLayer", layer) for layer in stack.conv_layers)
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
    placement, valid_N = _place_tiles(lengths, layers, shape, wav_BT.device)
    n_tiles = len(placement.owner_M)
    x_NC = _concatenate(wav_BT, placement)[:, None]
    x: Tensor | _Product = x_NC
    if layers[0].norm == "group":  # the statistics of the norm depend on the whole utterance
        x, layers = _group_normed(layers[0], x_NC, placement), layers[1:]
    blocks = [(x, TILE * n_tiles)] if torch.is_grad_enabled() else _blocks(x, n_tiles)
    x_NC = torch.cat([_run_layers(layers, block)[:n] for block, n in blocks])
    return F.gelu(x_NC.index_select(0, valid_N))


def _frame_grid(layers: Iterable[ConvLayer]) -> FrameGrid:
    """Return the positions of the output frames of `layers` in their input."""
    convs = [layer.conv for layer in layers]
    return FrameGrid.from_convs([conv.kernel_size[0] for conv in convs], [conv.stride[0] for conv in convs])


class _Placement(NamedTuple):
    """Assignment of tiles to utterances."""

    tile_size: int  # number of samples per tile
    owner_M: Tensor  # index of the utterance of each tile
    position_M: Tensor  # index of each tile within its utterance
    n_samples_M: Tensor  # number of samples from the start of a tile to the end of its utterance
    n_frames_B: Tensor  # number of valid output frames of the first layer in each utterance


def _place_tiles(
    lengths: Sequence[int], layers: Sequence[ConvLayer], shape: PackedShape | None, device: torch.device
) -> tuple[_Placement, Tensor]:
    """Assign tiles to the utterances of a batch, and pad all sizes to `shape`.

    Filler tiles are read from beyond the end of the first utterance and therefore contain zeros.

    Returns:
        The assignment, and the output row (N,) of each valid frame, followed by row 0 for each filler row.
    """
    grid, first_grid = _frame_grid(layers), _frame_grid(layers[:1])
    tile_size = TILE * grid.hop
    # Numbers of tiles, output frames and frames of the first layer in each utterance
    tiles = [-(-n // tile_size) for n in lengths]
    frames = [grid.n_frames(n) for n in lengths]
    first_frames = [first_grid.n_frames(n) for n in lengths]
    n_tiles = padded_size(sum(tiles), shape and shape.n_tiles, "tiles", BLOCK // TILE)
    n_utterances = padded_size(len(lengths), shape and shape.n_utterances, "utterances")
    n_rows = padded_size(sum(frames), shape and shape.n_rows, "frames", BLOCK)

    n_filler = n_tiles - sum(tiles)
    owner = np.append(np.repeat(np.arange(len(tiles)), tiles), np.zeros(n_filler, np.int64))
    position = np.append(concat_ranges(np.zeros(len(tiles)), tiles), np.full(n_filler, tiles[0]))
    n_samples = np.asarray(lengths)[owner] - tile_size * position
    first_frames += [1] * (n_utterances - len(lengths))  # a mean over no frames would be NaN
    first_row = TILE * (np.cumsum(tiles) - tiles)
    valid = np.append(concat_ranges(first_row, frames), np.zeros(n_rows - sum(frames)))
    owner_M, position_M, n_samples_M, n_frames_B, valid_N = index_tensors(
        device, owner, position, n_samples, first_frames, valid
    )
    return _Placement(tile_size, owner_M, position_M, n_samples_M, n_frames_B), valid_N


def _concatenate(wav_BT: Tensor, placement: _Placement) -> Tensor:
    """Concatenate all waveforms as a tensor (N,), each padded with zeros to whole tiles."""
    size = placement.tile_size
    padded_BT = F.pad(wav_BT, (0, -wav_BT.shape[1] % size))
    per_row = padded_BT.shape[1] // size
    index_M = per_row * placement.owner_M + placement.position_M.clamp(max=per_row - 1)
    wav_MT = padded_BT.reshape(-1, size).index_select(0, index_M)
    valid_MT = torch.arange(size, device=wav_BT.device) < placement.n_samples_M[:, None]
    return torch.where(valid_MT, wav_MT, 0.0).flatten()


class _Product(NamedTuple):
    """Output of the first layer as two factors, because their product would be the largest activation."""

    taps_MRK: Tensor
    weight_MKC: Tensor


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


def _group_normed(layer: ConvLayer, x_NC: Tensor, placement: _Placement) -> _Product:
    """Express convolution and group norm as the product of each tile and the weights of its utterance."""
    norm, kernel = cast(nn.GroupNorm, layer.layer_norm), layer.conv.weight.shape[2]
    dtype = autocast_dtype(layer.conv.weight)
    taps_MRK = _taps(x_NC, kernel, layer.conv.stride[0]).unflatten(0, (len(placement.owner_M), -1))
    with torch.autocast(x_NC.device.type, enabled=False):
        mean_BK, covariance_BKK = _moments(taps_MRK, placement)
        weight_CK = layer.conv.weight[:, 0].to(mean_BK.dtype)
        variance_BC = torch.einsum("ck,bkl,cl->bc", weight_CK, covariance_BKK, weight_CK)
        scale_BC = norm.weight * torch.rsqrt(variance_BC.clamp_min(0.0) + norm.eps)
        shift_BC = norm.bias - mean_BK @ weight_CK.T * scale_BC
        if layer.conv.bias is not None:  # the norm cancels the bias, but a zero gradient is still required
            shift_BC = shift_BC + 0.0 * layer.conv.bias
        weight_BKC = torch.cat([weight_CK.T * scale_BC[:, None], shift_BC[:, None]], dim=1)
        taps_MRK = F.pad(taps_MRK, (0, 1), value=1.0)  # the column of ones is multiplied by the shift
        if x_NC.device.type != "cpu":  # a GPU multiplies 16 taps faster than 11
            weight_BKC = F.pad(weight_BKC, (0, 0, 0, -(kernel + 1) % 8))
            taps_MRK = F.pad(taps_MRK, (0, -(kernel + 1) % 8))
        # The precision is reduced after `index_select`, whose gradient sums over the tiles of an utterance.
        weight_BKC = weight_BKC.to(torch.promote_types(dtype, torch.float32))
        weight_MKC = weight_BKC.index_select(0, placement.owner_M)
        return _Product(taps_MRK.to(dtype), weight_MKC.to(dtype))


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


def _moments(taps_MRK: Tensor, placement: _Placement) -> tuple[Tensor, Tensor]:
    """Compute the mean (B, K) and covariance (B, K, K) of the taps over the valid rows of each utterance.

    The sums are in float64 if the device supports it, because a channel may pass only a small part of the
    power of its taps.
    """
    exact = torch.float32 if taps_MRK.device.type == "mps" else torch.float64  # MPS does not support float64
    count_B = placement.n_frames_B.to(exact)
    row_MR = placement.position_M[:, None] * taps_MRK.shape[1] + torch.arange(
        taps_MRK.shape[1], device=taps_MRK.device
    )
    valid_MR = row_MR < placement.n_frames_B[placement.owner_M][:, None]
    taps_MRK = torch.where(valid_MR[..., None], taps_MRK, 0.0).to(exact)
    sum_MK, square_MKK = taps_MRK.sum(1), taps_MRK.transpose(1, 2) @ taps_MRK
    n, kernel = len(count_B), taps_MRK.shape[2]
    sum_BK = sum_MK.new_zeros(n, kernel).index_add(0, placement.owner_M, sum_MK)
    square_BKK = sum_MK.new_zeros(n, kernel, kernel).index_add(0, placement.owner_M, square_MKK)
    mean_BK = sum_BK / count_B[:, None]
    covariance_BKK = square_BKK / count_B[:, None, None] - mean_BK[:, :, None] * mean_BK[:, None, :]
    return mean_BK, covariance_BKK


def _taps(x_NC: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the samples (N / stride, K) in the receptive field of each output frame of the first layer."""
    rows = x_NC.view(-1, stride)
    shifts = -(-kernel // stride)
    padded = F.pad(rows, (0, 0, 0, shifts - 1))
    return torch.cat([padded[j : j + len(rows)] for j in range(shifts)], dim=1)[:, :kernel]


def _gelu_conv(x: Tensor, tile_weight: Tensor | None, weight_OCK: Tensor, stride: int, gelu: bool) -> Tensor:
    """Apply GELU, if `gelu`, and a strided convolution to x (N, C).

    With `tile_weight` (M, K, C), the input is the product x (M, R, K) @ tile_weight.

    This plain version is used for second derivatives; `_GeluConv` is faster.
    """
    _, channels, kernel = weight_OCK.shape
    x_NC = x if tile_weight is None else torch.bmm(x, tile_weight).view(-1, channels)
    x_CN = F.pad((F.gelu(x_NC) if gelu else x_NC).T, (0, max(0, kernel - stride)))
    return F.conv1d(x_CN[None], weight_OCK.to(x.dtype), stride=stride)[0].T


class _GeluConv(torch.autograd.Function):
    """`_gelu_conv` implemented with matrix products, as the module docstring describes.

    Only x, `tile_weight` (if given) and the weights are stored for the backward pass. On a CPU, only some of
    the rows are processed at a time, so that intermediate results remain in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tile_weight: Tensor | None, weight_OCK: Tensor, stride: int, gelu: bool
    ) -> Tensor:
        outs, channels = weight_OCK.shape[:2]
        # The weights are split by input row: taps in the same row as the output, in the next row, and so on.
        taps = weight_OCK.to(x.dtype).permute(2, 1, 0).reshape(-1, outs).split(stride * channels)
        ctx.shape, ctx.width, ctx.gelu = weight_OCK.shape, stride * channels, gelu
        n, ranges = _row_ranges(x, tile_weight, ctx.width)
        y_NO = x.new_empty(n, outs)
        for start, stop in ranges:
            rows = _rows(x, tile_weight, ctx.width, start, stop)
            rows = F.gelu(rows) if gelu else rows
            for j, tap in enumerate(taps):  # row i contributes to outputs i, i - 1, ...
                begin = max(start, j)
                matmul_into(y_NO[begin - j : stop - j], rows[begin - start :, : len(tap)], tap, add=j > 0)
        ctx.save_for_backward(x, tile_weight, *taps)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x, tile_weight, *taps = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        needs = any(ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_tile_weight = None if tile_weight is None else torch.empty_like(tile_weight)
        grad_taps = [tap.new_zeros(tap.shape, dtype=torch.float32) for tap in taps]
        for start, stop in _row_ranges(x, tile_weight, ctx.width)[1]:
            rows = _rows(x, tile_weight, ctx.width, start, stop)
            # The first product overwrites whole rows, unless the kernel is narrower than the stride.
            grad_rows = torch.empty_like(rows) if len(taps[0]) == ctx.width else torch.zeros_like(rows)
            grads = [grad_NO[max(start - j, 0) : stop - j] for j in range(len(taps))]
            for j, (tap, grad) in enumerate(zip(taps, grads, strict=True)):
                if needs:
                    matmul_into(grad_rows[max(j - start, 0) :, : len(tap)], grad, tap.T, add=j > 0)
            active = gelu_backward(rows, grad_rows) if ctx.gelu else rows
            for j, (grad_tap, grad) in enumerate(zip(grad_taps, grads, strict=True)):
                _add_product(grad_tap, active[max(j - start, 0) :, : len(grad_tap)].T, grad)
            if tile_weight is not None and grad_tile_weight is not None:
                tiles = _tile_slice(x, tile_weight, ctx.width, start, stop)
                grad_MRC = grad_rows.view(-1, x.shape[1], tile_weight.shape[2])
                torch.bmm(x[tiles].transpose(1, 2), grad_MRC, out=grad_tile_weight[tiles])
                if grad_x is not None:
                    torch.bmm(grad_MRC, tile_weight[tiles].transpose(1, 2), out=grad_x[tiles])
            elif grad_x is not None:
                grad_x.view(-1, ctx.width)[start:stop] = grad_rows
        outs, channels, kernel = ctx.shape
        grad_OCK = torch.cat(grad_taps).view(kernel, channels, outs).permute(2, 1, 0)
        return grad_x, grad_tile_weight, grad_OCK, None, None


def _rows_per_tile(x: Tensor, tile_weight: Tensor, width: int) -> int:
    """Return the number of rows of `width` values per tile of a product."""
    return x.shape[1] * tile_weight.shape[2] // width


def _tile_slice(x: Tensor, tile_weight: Tensor, width: int, start: int, stop: int) -> slice:
    n = _rows_per_tile(x, tile_weight, width)
    return slice(start // n, stop // n)


def _rows(x: Tensor, tile_weight: Tensor | None, width: int, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` of the input, with `width` values each."""
    if tile_weight is None:
        return x.view(-1, width)[start:stop]
    tiles = _tile_slice(x, tile_weight, width, start, stop)
    return torch.bmm(x[tiles], tile_weight[tiles]).view(-1, width)


def _row_ranges(x: Tensor, tile_weight: Tensor | None, width: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of rows and the row ranges to process in turn, which fit in the cache of a CPU."""
    unit = BLOCK if tile_weight is None else _rows_per_tile(x, tile_weight, width)
    n = x.numel() // width if tile_weight is None else len(x) * unit
    step = max(1, CACHED // (width * unit)) * unit if x.device.type == "cpu" else n
    return n, [(start, min(start + step, n)) for start in range(0, n, step)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which is float32."""
    if a.dtype is total.dtype:
        matmul_into(total, a, b, add=True)
    else:
        total.add_(a @ b)
