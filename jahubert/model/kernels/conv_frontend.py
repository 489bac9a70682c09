"""The convolutional front end: 16 kHz samples to 50 Hz frames, without padding and without transposing.

All waveforms of a batch lie end to end in one buffer, each filled up with zeros to whole tiles of 8
output frames, and time comes before channels. A convolution of stride `s` is then a matrix product of
rows of `s` input frames, plus one of the same rows shifted by one for the taps that reach further: no
copy, no padded batch, and the fastest kernel that a device has. Rows that reach over the end of an
utterance hold rubbish; no valid frame ever reads them, and they are cut off at the end.

The group norm behind the first layer (HuBERT base) scales every channel of an utterance by statistics
over its whole length. As that layer is linear in its few taps, the statistics follow from the mean
and covariance of the taps themselves, and norm and convolution become one product with weights of the
utterance's own.

Shapes: B utterances, N frames of the batch end to end, T tiles of R rows, C channels, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model.kernels.indexing import BLOCK, concat_ranges, index_tensors, round_up
from jahubert.model.precision import autocast_dtype

TILE = 8  # output frames; each utterance begins on a whole one
AT_ONCE = 128  # tiles that go through the stack together when no gradient is wanted
CACHED = 2**20  # numbers that a CPU works on at once: what its caches hold


@dataclass(frozen=True)
class Rows:
    """Where the utterances lie in a buffer: in which tiles of equal length, and how much of them is valid."""

    owner_T: Tensor  # the utterance that each tile belongs to
    place_T: Tensor  # the tile's number within its utterance
    n_frames_B: Tensor  # valid rows of each utterance


class _Product(NamedTuple):
    """The output of the first layer as two factors: the largest tensor of all is cheaper made than kept."""

    taps_TRK: Tensor
    weight_TKC: Tensor


class ConvLayer(nn.Module):
    """GELU of the layer below, one convolution over time, a norm where the layer has one."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int, bias: bool, norm: str | None):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.stride, self.norm, self.first = stride, norm, dim_in == 1
        if norm == "group":
            self.layer_norm: nn.Module = nn.GroupNorm(dim, dim)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor | _Product) -> Tensor:
        """Rows of a layer without group norm."""
        dtype = autocast_dtype(self.conv.weight)
        factors = x if isinstance(x, _Product) else (x.to(dtype), None)
        x_NC = _GeluConv.apply(*factors, self.conv.weight, self.stride, not self.first)
        if self.conv.bias is not None:
            x_NC = x_NC + self.conv.bias.to(dtype)
        if self.norm == "layer":
            x_NC = self.layer_norm(x_NC)
        return x_NC

    def group_normed(self, x_NC: Tensor, rows: Rows) -> _Product:
        """Convolution and group norm in one: each tile times the weights and shift of its utterance."""
        norm, kernel = cast(nn.GroupNorm, self.layer_norm), self.conv.weight.shape[2]
        dtype = autocast_dtype(self.conv.weight)
        taps_TRK = _taps(x_NC, kernel, self.stride).unflatten(0, (len(rows.owner_T), -1))
        with torch.autocast(x_NC.device.type, enabled=False):
            mean_BK, covariance_BKK = _moments(taps_TRK, rows)
            weight_CK = self.conv.weight[:, 0].to(mean_BK.dtype)
            variance_BC = torch.einsum("ck,bkl,cl->bc", weight_CK, covariance_BKK, weight_CK)
            scale_BC = norm.weight * torch.rsqrt(variance_BC.clamp_min(0.0) + norm.eps)
            shift_BC = norm.bias - mean_BK @ weight_CK.T * scale_BC
            if self.conv.bias is not None:  # the norm takes it away again, but it is owed a gradient
                shift_BC = shift_BC + 0.0 * self.conv.bias
            weight_BKC = torch.cat([weight_CK.T * scale_BC[:, None], shift_BC[:, None]], dim=1)
            taps_TRK = F.pad(taps_TRK, (0, 1), value=1.0)  # the last one meets the shift
            if x_NC.device.type != "cpu":  # a GPU multiplies 16 taps faster than 11
                weight_BKC = F.pad(weight_BKC, (0, 0, 0, -(kernel + 1) % 8))
                taps_TRK = F.pad(taps_TRK, (0, -(kernel + 1) % 8))
            # Few bits come after the selection, as its gradient sums an utterance's tiles.
            weight_BKC = weight_BKC.to(torch.promote_types(dtype, torch.float32))
            weight_TKC = weight_BKC.index_select(0, rows.owner_T)
            return _Product(taps_TRK.to(dtype), weight_TKC.to(dtype))


class ConvFrontEnd(nn.Module):
    """A stack of unpadded convolutions: samples to frames of `conv_dims[-1]` channels."""

    def __init__(
        self,
        dims: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        *,
        bias: bool,
        norm: Literal["group", "layer"],
    ):
        super().__init__()
        self.conv_layers = nn.ModuleList(
            ConvLayer(dim_in, dim, kernel, stride, bias, norm if norm == "layer" or i == 0 else None)
            for i, (dim_in, dim, kernel, stride) in enumerate(
                zip((1, *dims), dims, kernels, strides, strict=False)
            )
        )

    def forward(self, wavs: Sequence[Tensor]) -> Tensor:
        """Frames (N, C) of all waveforms, each at least one frame long.

        The valid ones end to end, and up to `BLOCK` - 1 rows of no meaning behind them.
        """
        layers = [cast(ConvLayer, layer) for layer in self.conv_layers]
        device, lengths = wavs[0].device, [len(wav) for wav in wavs]
        rate = math.prod(layer.stride for layer in layers)  # rows of the buffer for each output frame
        tiles = [-(-n // (rate * TILE)) for n in lengths]
        first = [TILE * n for n in accumulate(tiles, initial=0)]
        total = round_up(first[-1], BLOCK)
        parts = [F.pad(w, (0, n * TILE * rate - len(w))) for w, n in zip(wavs, tiles, strict=True)]
        x_NC = torch.cat([*parts, parts[0].new_zeros((total - first[-1]) * rate)])[:, None]
        x: Tensor | _Product = x_NC
        kept = []  # frames of each utterance behind each layer
        for layer in layers:
            lengths = [(n - layer.conv.kernel_size[0]) // layer.stride + 1 for n in lengths]
            kept.append(lengths)
        spare = total // TILE - sum(tiles)  # tiles that may belong to anyone: behind any utterance's end
        owner_T, place_T, n_frames_B, valid_N = index_tensors(
            device,
            np.append(np.repeat(np.arange(len(tiles)), tiles), np.zeros(spare)),
            np.append(concat_ranges(np.zeros(len(tiles)), tiles), np.full(spare, tiles[0])),
            kept[0],
            np.append(concat_ranges(first[:-1], lengths), np.zeros(-sum(lengths) % BLOCK)),
        )
        if layers[0].norm == "group":  # its statistics need all of an utterance
            rows = Rows(owner_T, place_T, n_frames_B)
            x, layers = layers[0].group_normed(x_NC, rows), layers[1:]
        blocks = [(x, total)] if torch.is_grad_enabled() else _blocks(x, len(owner_T))
        x_NC = torch.cat([_stack(layers, block)[:n] for block, n in blocks])
        return F.gelu(x_NC.index_select(0, valid_N))


def _stack(layers: Sequence[ConvLayer], x: Tensor | _Product) -> Tensor:
    for layer in layers:
        x = layer(x)
    return torch.bmm(*x).flatten(0, 1) if isinstance(x, _Product) else x


def _blocks(x: Tensor | _Product, n_tiles: int) -> Iterator[tuple[Tensor | _Product, int]]:
    """Some tiles at a time, and the rows that count: the first layers take a hundred times what comes out.

    A block has one tile more than it gives, as its last frames reach into it.
    """
    given: Sequence[Tensor] = x if isinstance(x, _Product) else [x.unflatten(0, (n_tiles, -1))]
    tensors = [torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) for tensor in given]
    for start in range(0, n_tiles, AT_ONCE):
        stop = min(start + AT_ONCE, n_tiles)
        parts = [tensor[start : stop + 1] for tensor in tensors]
        block = _Product(*parts) if isinstance(x, _Product) else parts[0].flatten(0, 1)
        yield block, (stop - start) * TILE


def _moments(taps_TRK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean (B, K) and covariance (B, K, K) of the taps over each utterance's valid rows.

    In float64: a channel may keep a small part of the power of its taps.
    """
    exact = torch.float32 if taps_TRK.device.type == "mps" else torch.float64  # mps has no float64
    count_B = rows.n_frames_B.to(exact)
    row_TR = rows.place_T[:, None] * taps_TRK.shape[1] + torch.arange(
        taps_TRK.shape[1], device=taps_TRK.device
    )
    valid_TR = row_TR < rows.n_frames_B[rows.owner_T][:, None]
    taps_TRK = torch.where(valid_TR[..., None], taps_TRK, 0.0).to(exact)
    sum_TK, square_TKK = taps_TRK.sum(1), taps_TRK.transpose(1, 2) @ taps_TRK
    n, kernel = len(count_B), taps_TRK.shape[2]
    sum_BK = sum_TK.new_zeros(n, kernel).index_add(0, rows.owner_T, sum_TK)
    square_BKK = sum_TK.new_zeros(n, kernel, kernel).index_add(0, rows.owner_T, square_TKK)
    mean_BK = sum_BK / count_B[:, None]
    covariance_BKK = square_BKK / count_B[:, None, None] - mean_BK[:, :, None] * mean_BK[:, None, :]
    return mean_BK, covariance_BKK


def _taps(x_NC: Tensor, kernel: int, stride: int) -> Tensor:
    """The `kernel` samples that each output frame of a one-channel input sees, (N / stride, K)."""
    rows = x_NC.view(-1, stride)
    shifts = -(-kernel // stride)
    padded = F.pad(rows, (0, 0, 0, shifts - 1))
    return torch.cat([padded[j : j + len(rows)] for j in range(shifts)], dim=1)[:, :kernel]


class _GeluConv(torch.autograd.Function):
    """Convolution of GELU(x), of (N, C) rows, as matrix products; see the module's docstring.

    Only x is kept for backward, or the factors whose product it is. On a CPU a part of the rows at a time, so
    that what stands between the products stays in the cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor | None, weight_OCK: Tensor, stride: int, gelu: bool) -> Tensor:
        outs, channels = weight_OCK.shape[:2]
        # taps, each with all its channels: those of the same row of the input, of the next, ...
        taps = weight_OCK.to(x.dtype).permute(2, 1, 0).reshape(-1, outs).split(stride * channels)
        ctx.shape, ctx.width, ctx.gelu = weight_OCK.shape, stride * channels, gelu
        n, parts = _parts(x, factor, ctx.width)
        y_NO = x.new_empty(n, outs)
        for start, stop in parts:
            rows = _rows(x, factor, ctx.width, start, stop)
            rows = F.gelu(rows) if gelu else rows
            for j, tap in enumerate(taps):  # row i belongs to the outputs i, i - 1, ...
                begin = max(start, j)
                y_NO[begin - j : stop - j].addmm_(rows[begin - start :, : len(tap)], tap, beta=int(j > 0))
        ctx.save_for_backward(x, factor, *taps)
        return y_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO: Tensor):
        x, factor, *taps = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        needs = any(ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_factor = None if factor is None else torch.empty_like(factor)
        grad_taps = [tap.new_zeros(tap.shape, dtype=torch.float32) for tap in taps]
        for start, stop in _parts(x, factor, ctx.width)[1]:
            rows = _rows(x, factor, ctx.width, start, stop)
            active = F.gelu(rows) if ctx.gelu else rows
            grad_rows = torch.zeros_like(rows)
            for j, (tap, grad_tap) in enumerate(zip(taps, grad_taps, strict=True)):
                begin = max(start, j)
                grad = grad_NO[begin - j : stop - j]
                _add_product(grad_tap, active[begin - start :, : len(tap)].T, grad)
                if needs:
                    grad_rows[begin - start :, : len(tap)].addmm_(grad, tap.T)
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
    """Rows of `width` numbers that a tile of a product makes."""
    return x.shape[1] * factor.shape[2] // width


def _tiles(x: Tensor, factor: Tensor, width: int, start: int, stop: int) -> slice:
    return slice(start // _tile(x, factor, width), stop // _tile(x, factor, width))


def _rows(x: Tensor, factor: Tensor | None, width: int, start: int, stop: int) -> Tensor:
    """Some rows of the input, `width` numbers each."""
    if factor is None:
        return x.view(-1, width)[start:stop]
    tiles = _tiles(x, factor, width, start, stop)
    return torch.bmm(x[tiles], factor[tiles]).view(-1, width)


def _parts(x: Tensor, factor: Tensor | None, width: int) -> tuple[int, list[tuple[int, int]]]:
    """The number of rows, and where to cut: what a CPU's cache holds, and not at all on other devices."""
    unit = BLOCK if factor is None else _tile(x, factor, width)
    n = x.numel() // width if factor is None else len(x) * unit
    step = max(1, CACHED // (width * unit)) * unit if x.device.type == "cpu" else n
    return n, [(start, min(start + step, n)) for start in range(0, n, step)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the total is float32 whatever they are."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
