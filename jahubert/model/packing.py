"""The valid frames of a padded batch laid end to end, so that no layer spends time on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jahubert.model.kernels.dropout import keep_mask
from jahubert.model.kernels.indexing import BLOCK, concat_ranges, index_tensors, round_up

SPAN = 32  # frames; attention and positional convolution work on multiples of it (see indices.BLOCK)
CACHED = 2**19  # attention weights computed at once on a CPU: what its caches hold


def fused_kernels(device: torch.device) -> AbstractContextManager:
    """For `Packing.attend`: all of torch's but cuDNN's, which plans anew for each batch size and length."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class _Span(NamedTuple):
    """Utterances of about one length, as a rectangle of packed rows."""

    index_P: Tensor  # the packed row of each place of the rectangle
    shape: tuple[int, int]  # utterances, frames
    bias_U1S: Tensor  # minus infinity where a place lies behind its utterance


class Packing:
    """Valid frames of a padded batch laid end to end, and attention inside each utterance.

    Packed tensors (N, D) hold the valid frames first and up to `BLOCK` - 1 rows of no meaning behind
    them, on which no result depends.
    """

    def __init__(self, n_frames: Sequence[int], width: int, device: torch.device):
        self.n_frames, self.width = list(n_frames), width
        self.n_rows, self.n_valid = len(self.n_frames), sum(n_frames)
        index = concat_ranges(width * np.arange(self.n_rows), n_frames)
        spare = np.full(-self.n_valid % BLOCK, index[0])
        self.index_N, n_frames_B = index_tensors(device, np.append(index, spare), n_frames)
        # Torch's fused attention. Made here, in plain tensors and numbers: `attend` may be compiled.
        self.fused, self.mask_B11S = device.type != "cpu", None
        if self.fused and min(n_frames) < width:
            self.mask_B11S = (torch.arange(width, device=device) < n_frames_B[:, None])[:, None, None]

    def pack(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """A padded batch, zero behind each utterance."""
        flat = x_ND.new_zeros(self.n_rows * self.width, *x_ND.shape[1:])
        # Not by `index_copy_`, whose gradient keeps all of x for its shape.
        flat[self.index_N[: self.n_valid]] = x_ND[: self.n_valid]
        return flat.unflatten(0, (self.n_rows, self.width))

    def attend(self, q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, dropout: float) -> Tensor:
        """Scaled dot-product attention; the three inputs and the result are (N, heads, head width)."""
        if self.fused:
            q, k, v = (self.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_B11S, dropout_p=dropout)
            return self.pack(out.transpose(1, 2))
        if q_NHE.dtype is torch.bfloat16 or dropout:
            return _SpanAttention.apply(q_NHE, k_NHE, v_NHE, *self._spans, self.n_valid, dropout)
        # One call an utterance computes no padded pair at all, but knows no dropout.
        parts = [*self.n_frames, len(q_NHE) - self.n_valid]
        rows = zip(*(x.transpose(0, 1)[None].split(parts, dim=2) for x in (q_NHE, k_NHE, v_NHE)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v) for q, k, v in rows]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    def windows(self, kernel: int) -> tuple[Tensor, Tensor]:
        """Each utterance in windows of 2 * `kernel` frames, one every `kernel`, from half a kernel before it.

        The packed row of every place of all windows (the row behind the last one where there is no frame),
        and for each packed row its place among the first halves of the windows.
        """
        n_frames, nowhere = np.array(self.n_frames), len(self.index_N)
        counts = -(-n_frames // kernel)
        owner_W, number_W = (
            np.repeat(np.arange(self.n_rows), counts),
            concat_ranges(np.zeros_like(counts), counts),
        )
        frame_WX = number_W[:, None] * kernel + np.arange(2 * kernel) - kernel // 2
        there = (frame_WX >= 0) & (frame_WX < n_frames[owner_W, None])
        start_B, first_B = (n.cumsum() - n for n in (n_frames, counts))
        row_WX = np.where(there, start_B[owner_W, None] + frame_WX, nowhere)
        back = np.append(concat_ranges(first_B * kernel, n_frames), np.zeros(nowhere - self.n_valid))
        there_X, back_N = index_tensors(self.index_N.device, row_WX.ravel(), back)
        return there_X, back_N

    @cached_property
    def _spans(self) -> tuple[list[_Span], Tensor]:
        """The rectangles, and where each packed row lies in them, laid end to end."""
        starts = list(accumulate(self.n_frames, initial=0))
        order = sorted(range(len(self.n_frames)), key=lambda row: self.n_frames[row])
        spans, place, back = [], 0, [0] * len(self.index_N)
        for frames, members in groupby(order, key=lambda row: round_up(self.n_frames[row], SPAN)):
            rows = list(members)
            index = torch.zeros(len(rows), frames, dtype=torch.int64)
            bias = torch.zeros(len(rows), 1, frames)
            for i, row in enumerate(rows):
                start, n = starts[row], self.n_frames[row]
                index[i, :n] = torch.arange(start, start + n)
                bias[i, ..., n:] = float("-inf")
                back[start : start + n] = range(place, place + n)
                place += frames
            spans.append(_Span(index.flatten(), (len(rows), frames), bias))
        return spans, torch.tensor(back)


class _SpanAttention(torch.autograd.Function):
    """Attention by plain matrix products over rectangles of few sizes (G heads of all utterances, S frames).

    On a CPU, torch's fused kernel knows no dropout and takes five times as long in bfloat16. A few heads at a
    time, so that all between the products stays in the cache; of each weight, one byte of dropout is kept for
    backward, the rest is computed again.
    """

    @staticmethod
    def forward(ctx, q_NHE, k_NHE, v_NHE, spans: list[_Span], back_N: Tensor, n_valid: int, dropout: float):
        heads, width = q_NHE.shape[1:]
        ctx.spans, ctx.n_valid, ctx.scale, ctx.keep_scale = spans, n_valid, width**-0.5, 1.0
        # A row is one head of one frame: first the places of all rectangles, then the way back.
        ctx.there, head_H = [], torch.arange(heads)
        for span in spans:
            index_U1S = span.index_P.view(span.shape[0], 1, span.shape[1])
            ctx.there.append((index_U1S * heads + head_H[:, None]).flatten())
        ctx.back_NH = _head_rows(spans, back_N, heads)
        outs, saved = [], []
        for span, there in zip(spans, ctx.there, strict=True):
            q, k, v = (_gather(x, there, span) for x in (q_NHE, k_NHE, v_NHE))
            out, keep = torch.empty_like(v), None
            q.mul_(ctx.scale)
            if dropout:
                keep, ctx.keep_scale = keep_mask((len(q), q.shape[1], q.shape[1]), dropout)
            for some, weights, _ in _weights(q, k, span):
                torch.bmm(weights if keep is None else weights.mul_(keep[some]), v[some], out=out[some])
            saved += [q, k, v, keep]
            outs.append(out.mul_(ctx.keep_scale))
        ctx.save_for_backward(*saved)
        return _scatter(outs, ctx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NHE: Tensor):
        grads, saved = [], ctx.saved_tensors  # once: recomputed activations can be had a single time
        for i, (span, there) in enumerate(zip(ctx.spans, ctx.there, strict=True)):
            q, k, v, keep = saved[4 * i : 4 * i + 4]
            grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
            grad = _gather(grad_NHE, there, span)
            # Nothing comes from behind an utterance.
            valid_U1S1 = span.bias_U1S.exp()[..., None].to(grad.dtype)
            grad.unflatten(0, (span.shape[0], -1)).mul_(ctx.keep_scale * valid_U1S1)
            for some, weights, spare in _weights(q, k, span):
                grad_weights = torch.bmm(grad[some], v[some].transpose(1, 2), out=spare)
                dropped = weights
                if keep is not None:
                    kept = keep[some].to(weights.dtype)
                    grad_weights.mul_(kept)
                    dropped = kept.mul_(weights)
                torch.bmm(dropped.transpose(1, 2), grad[some], out=grad_v[some])
                grad_scores = torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                torch.bmm(grad_scores, k[some], out=grad_q[some])
                torch.bmm(grad_scores.transpose(1, 2), q[some], out=grad_k[some])
            grads.append((grad_q.mul_(ctx.scale), grad_k, grad_v))
        return *(_scatter(parts, ctx) for parts in zip(*grads, strict=True)), None, None, None, None


def _weights(q_GSE: Tensor, k_GSE: Tensor, span: _Span) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The softmax of a few heads at a time: which, their weights, and a spare buffer of the same size."""
    heads, frames = len(q_GSE), q_GSE.shape[1]
    step = max(1, CACHED // frames**2)
    buffers = q_GSE.new_empty(2, min(step, heads), frames, frames)
    bias_G1S = span.bias_U1S.to(q_GSE.dtype).repeat_interleave(heads // span.shape[0], dim=0)
    for start in range(0, heads, step):
        some = slice(start, min(start + step, heads))
        weights, scores = buffers[:, : some.stop - start]
        torch.bmm(q_GSE[some], k_GSE[some].transpose(1, 2), out=scores)
        yield some, torch.softmax(scores.add_(bias_G1S[some]), dim=-1, out=weights), scores


def _gather(x_NHE: Tensor, there: Tensor, span: _Span) -> Tensor:
    """The rows of a rectangle, all heads of all utterances: (G, S, E)."""
    return x_NHE.reshape(-1, x_NHE.shape[2]).index_select(0, there).unflatten(0, (-1, span.shape[1]))


def _head_rows(spans: list[_Span], back_N: Tensor, heads: int) -> Tensor:
    """Where each head of each packed row lies in the rectangles of `_gather`, laid end to end."""
    place_X, start = [], 0
    for utterances, frames in (span.shape for span in spans):
        rows_UHS = torch.arange(start * heads, (start + utterances * frames) * heads).view(-1, heads, frames)
        place_X.append(rows_UHS.transpose(1, 2).reshape(-1, heads))
        start += utterances * frames
    return torch.cat(place_X).index_select(0, back_N).flatten()


def _scatter(parts: Sequence[Tensor], ctx) -> Tensor:
    """From rectangles back to packed rows (N, H, E); those of no meaning become zero."""
    rows = [x.view(-1, x.shape[2]) for x in parts]
    flat = rows[0] if len(rows) == 1 else torch.cat(rows)
    heads = len(ctx.there[0]) // len(ctx.spans[0].index_P)
    out_NHE = flat.index_select(0, ctx.back_NH).unflatten(0, (-1, heads))
    out_NHE[ctx.n_valid :] = 0
    return out_NHE
