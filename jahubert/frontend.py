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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE = 8  # output frames; each utterance begins on a whole one
AT_ONCE = {"cpu": 32, "other": 1024}  # tiles that go through the stack together when no gradient is wanted
BLOCK = 64  # rows; batches come in few sizes, as oneDNN compiles a kernel for every new one


@dataclass(frozen=True)
class Rows:
    """Where the utterances lie in a buffer: in which tiles of equal length, and how much of them is valid."""

    owner_T: Tensor  # the utterance that each tile belongs to
    place_T: Tensor  # the tile's number within its utterance
    n_frames_B: Tensor  # valid rows of each utterance


class ConvLayer(nn.Module):
    """One convolution over time, a norm where the layer has one, GELU."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int, bias: bool, norm: str | None):
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.stride, self.norm = stride, norm
        if norm == "group":
            self.layer_norm: nn.Module = nn.GroupNorm(dim, dim)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x_NC: Tensor, weights: Tensor, owner_T: Tensor) -> Tensor:
        """Rows of the layer; `weights` is what `prepare` made for the whole batch."""
        if self.norm == "group":
            taps_TRK = self._taps(x_NC).unflatten(0, (len(owner_T), -1))
            taps_TRK = F.pad(taps_TRK, (0, 1), value=1.0).to(weights.dtype)  # the last one meets the shift
            return _gelu(torch.bmm(taps_TRK, weights.index_select(0, owner_T)).flatten(0, 1))
        x_NC = _Conv.apply(x_NC.to(weights.dtype), weights, self.conv.in_channels, self.stride)
        if self.conv.bias is not None:
            x_NC = x_NC + self.conv.bias.to(weights.dtype)
        if self.norm == "layer":
            x_NC = self.layer_norm(x_NC)
        return _gelu(x_NC)

    def prepare(self, x_NC: Tensor, rows: Rows) -> Tensor:
        """Weights as matrices: (K * C, outputs), or with a group norm (K + 1, outputs) for each utterance."""
        if self.norm == "group":
            return self._folded(x_NC, rows)
        weight_OCK = self.conv.weight.to(_compute_dtype(self.conv.weight))
        return weight_OCK.permute(2, 1, 0).flatten(0, 1)  # taps, each with all its channels

    def _folded(self, x_NC: Tensor, rows: Rows) -> Tensor:
        """Convolution and group norm in one: taps and shift (B, K + 1, C) of each utterance."""
        norm, dtype = cast(nn.GroupNorm, self.layer_norm), _compute_dtype(self.conv.weight)
        taps_TRK = self._taps(x_NC).unflatten(0, (len(rows.owner_T), -1))
        with torch.autocast(x_NC.device.type, enabled=False):
            mean_BK, covariance_BKK = _moments(taps_TRK, rows)
            weight_CK = self.conv.weight[:, 0].to(mean_BK.dtype)
            variance_BC = torch.einsum("ck,bkl,cl->bc", weight_CK, covariance_BKK, weight_CK)
            scale_BC = norm.weight * torch.rsqrt(variance_BC.clamp_min(0.0) + norm.eps)
            shift_BC = norm.bias - mean_BK @ weight_CK.T * scale_BC
            if self.conv.bias is not None:  # the norm takes it away again, but it is owed a gradient
                shift_BC = shift_BC + 0.0 * self.conv.bias
            return torch.cat([weight_CK.T * scale_BC[:, None], shift_BC[:, None]], dim=1).to(dtype)

    def _taps(self, x_NC: Tensor) -> Tensor:
        """The samples that each output frame of a one-channel input sees, (N / stride, K)."""
        kernel = self.conv.weight.shape[2]
        rows = x_NC.view(-1, self.stride)
        shifts = -(-kernel // self.stride)
        padded = F.pad(rows, (0, 0, 0, shifts - 1))
        return torch.cat([padded[j : j + len(rows)] for j in range(shifts)], dim=1)[:, :kernel]


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
        rate = 1  # rows of the buffer for each output frame
        for layer in layers:
            rate *= layer.stride
        tiles = [-(-n // (rate * TILE)) for n in lengths]
        first = [TILE * n for n in accumulate(tiles, initial=0)]
        total = up_to(first[-1], BLOCK)
        parts = [F.pad(w, (0, n * TILE * rate - len(w))) for w, n in zip(wavs, tiles, strict=True)]
        x_NC = torch.cat([*parts, parts[0].new_zeros((total - first[-1]) * rate)])[:, None]
        owner = [i for i, n in enumerate(tiles) for _ in range(n)]
        place = [j for n in tiles for j in range(n)]
        spare = total // TILE - len(owner)  # they may belong to anyone: behind any utterance's end
        owner_T = torch.tensor(owner + [0] * spare, device=device)
        place_T = torch.tensor(place + [tiles[0]] * spare, device=device)
        kernel, stride = layers[0].conv.kernel_size[0], layers[0].stride
        n_first_B = torch.tensor([(n - kernel) // stride + 1 for n in lengths], device=device)
        weights = [layer.prepare(x_NC, Rows(owner_T, place_T, n_first_B)) for layer in layers]
        run = self._stack if torch.is_grad_enabled() else self._blockwise
        x_NC = run(x_NC, weights, owner_T)
        lengths = self._n_frames(lengths)
        valid = [i for start, n in zip(first, lengths, strict=False) for i in range(start, start + n)]
        valid += [0] * (up_to(len(valid), BLOCK) - len(valid))
        return x_NC.index_select(0, torch.tensor(valid, device=device))

    def _stack(self, x_NC: Tensor, weights: list[Tensor], owner_T: Tensor) -> Tensor:
        for layer, own in zip(self.conv_layers, weights, strict=True):
            x_NC = layer(x_NC, own, owner_T)
        return x_NC

    def _blockwise(self, x_NC: Tensor, weights: list[Tensor], owner_T: Tensor) -> Tensor:
        """The same some tiles at a time: the first layers are a hundred times as large as what comes out.

        A block sees one tile more than it gives, as its last frames reach into it.
        """
        n_tiles, size = len(owner_T), AT_ONCE["cpu" if x_NC.device.type == "cpu" else "other"]
        rows = len(x_NC) // n_tiles
        x_NC, owner_T = F.pad(x_NC, (0, 0, 0, rows)), F.pad(owner_T, (0, 1))
        parts = []
        for start in range(0, n_tiles, size):
            end = min(start + size, n_tiles)
            part = self._stack(x_NC[start * rows : (end + 1) * rows], weights, owner_T[start : end + 1])
            parts.append(part[:-TILE])
        return torch.cat(parts)

    def _n_frames(self, lengths: Sequence[int]) -> list[int]:
        for layer in cast(Sequence[ConvLayer], self.conv_layers):
            lengths = [(n - layer.conv.kernel_size[0]) // layer.stride + 1 for n in lengths]
        return list(lengths)


def _gelu(x: Tensor) -> Tensor:
    """In place where nobody will want the input again."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def up_to(n: int, multiple: int) -> int:
    """The next multiple at or above `n`."""
    return -(-n // multiple) * multiple


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


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of matrix products: autocast does not reach into functions with a backward of their own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _Conv(torch.autograd.Function):
    """Convolution of (N, C) rows as matrix products; see the module's docstring."""

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_KO: Tensor, channels: int, stride: int) -> Tensor:
        rows = x_NC.view(-1, stride * channels)
        out, *further = weight_KO.split(stride * channels)
        y_NO = rows[:, : len(out)] @ out
        for j, part in enumerate(further, start=1):
            y_NO[:-j].addmm_(rows[j:, : len(part)], part)
        ctx.save_for_backward(rows, weight_KO)
        ctx.channels = channels
        return y_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO: Tensor):
        rows, weight_KO = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        n, width = rows.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(rows) if len(weight_KO) < width else torch.empty_like(rows)
            for j, part in enumerate(weight_KO.split(width)):
                if j == 0:
                    torch.mm(grad_NO, part.T, out=grad_x[:, : len(part)])
                else:
                    grad_x[j:, : len(part)].addmm_(grad_NO[: n - j], part.T)
            grad_x = grad_x.view(-1, ctx.channels)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_KO)
            for j, part in enumerate(grad_weight.split(width)):
                torch.mm(rows[j:, : len(part)].T, grad_NO[: n - j], out=part)
        return grad_x, grad_weight, None, None
