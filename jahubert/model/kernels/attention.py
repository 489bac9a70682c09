"""Attention inside each utterance of packed frames, without computing on padding where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jahubert.model.kernels.dispatch import once_differentiable
from jahubert.model.kernels.dropout import keep_mask
from jahubert.model.kernels.packing import Packing, Rectangle
from jahubert.model.precision import autocast_dtype

if TYPE_CHECKING:
    from jahubert.model.hubert import Attention

CACHED = 2**19  # attention weights computed at once on a CPU, so that they fit in its caches


def fused_kernels(device: torch.device) -> AbstractContextManager:
    """On a GPU, enable all of torch's attention kernels except cuDNN's, which replans for every new size."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def self_attention(module: Attention, x_ND: Tensor, packing: Packing) -> Tensor:
    """Apply the attention layer `module` to packed frames."""
    x_ND = x_ND.to(autocast_dtype(x_ND))  # once, not in each of the three products
    q_NHE, k_NHE, v_NHE = (
        project(x_ND).unflatten(1, (module.heads, -1))
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    dropout = module.dropout if module.training else 0.0
    return module.out_proj(attend(q_NHE, k_NHE, v_NHE, packing, dropout).flatten(1))


def attend(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, dropout: float) -> Tensor:
    """Scaled dot-product attention of packed queries, keys and values (N, heads, head width)."""
    if (
        packing.flash is not None
        and q_NHE.dtype in (torch.bfloat16, torch.float16)
        and q_NHE.shape[2] % 8 == 0
    ):
        return flash_attention(q_NHE, k_NHE, v_NHE, *packing.flash, dropout)
    if packing.fused_attention:
        q, k, v = (packing.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask_B11S, dropout_p=dropout)
        return packing.pack(out.transpose(1, 2))
    if q_NHE.dtype is torch.bfloat16 or dropout:
        return _RectangleAttention.apply(q_NHE, k_NHE, v_NHE, *packing.rectangles, packing.n_valid, dropout)
    # One call per utterance computes no padding at all, but torch's fused CPU kernel has no dropout.
    parts = [*packing.n_frames, len(q_NHE) - packing.n_valid]
    rows = zip(*(x.transpose(0, 1)[None].split(parts, dim=2) for x in (q_NHE, k_NHE, v_NHE)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v) for q, k, v in rows]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def flash_attention(
    q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, offsets: Tensor, longest: int, dropout: float
) -> Tensor:
    """Attention inside each of the concatenated sequences (Dao 2023, arXiv 2307.08691), by torch's operator.

    `torch.nn.attention.varlen` offers the same from torch 2.10 on, without dropout.
    """
    out_NHE, *_ = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NHE, v_NHE, offsets, offsets, longest, longest, dropout, False, False
    )
    return out_NHE


class _RectangleAttention(torch.autograd.Function):
    """Attention by batched matrix products over heads padded to a few lengths (G heads, S frames).

    On a CPU, torch's fused kernel has no dropout and takes five times as long in bfloat16. A few heads
    are computed at a time, so that intermediate results stay in the cache; for the backward pass, one byte of
    dropout mask per weight is stored and the rest is recomputed.
    """

    @staticmethod
    def forward(
        ctx, q_NHE, k_NHE, v_NHE, rectangles: list[Rectangle], position_N, n_valid: int, dropout: float
    ):
        heads, width = q_NHE.shape[1:]
        ctx.rectangles, ctx.n_valid, ctx.scale, ctx.keep_scale = rectangles, n_valid, width**-0.5, 1.0
        # A row is one head of one frame: gathered into the rectangles, and scattered back from them.
        ctx.gather, head_H = [], torch.arange(heads, device="cpu")
        for rectangle in rectangles:
            index_U1S = rectangle.index_P.view(rectangle.shape[0], 1, rectangle.shape[1])
            ctx.gather.append((index_U1S * heads + head_H[:, None]).flatten())
        ctx.scatter_NH = _head_rows(rectangles, position_N, heads)
        outs, saved = [], []
        for rectangle, gather in zip(rectangles, ctx.gather, strict=True):
            q, k, v = (_gather(x, gather, rectangle) for x in (q_NHE, k_NHE, v_NHE))
            out, keep = torch.empty_like(v), None
            q.mul_(ctx.scale)
            if dropout:
                keep, ctx.keep_scale = keep_mask((len(q), q.shape[1], q.shape[1]), dropout)
            for part, weights, _ in _weights(q, k, rectangle):
                torch.bmm(weights if keep is None else weights.mul_(keep[part]), v[part], out=out[part])
            saved += [q, k, v, keep]
            outs.append(out.mul_(ctx.keep_scale))
        ctx.save_for_backward(*saved)
        return _scatter(outs, ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHE: Tensor):
        grads, saved = [], ctx.saved_tensors  # read once: recomputed activations are available a single time
        for i, (rectangle, gather) in enumerate(zip(ctx.rectangles, ctx.gather, strict=True)):
            q, k, v, keep = saved[4 * i : 4 * i + 4]
            grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
            grad = _gather(grad_NHE, gather, rectangle)
            # No gradient comes from after the end of an utterance.
            valid_U1S1 = rectangle.bias_U1S.exp()[..., None].to(grad.dtype)
            grad.unflatten(0, (rectangle.shape[0], -1)).mul_(ctx.keep_scale * valid_U1S1)
            for part, weights, buffer in _weights(q, k, rectangle):
                grad_weights = torch.bmm(grad[part], v[part].transpose(1, 2), out=buffer)
                dropped = weights
                if keep is not None:
                    kept = keep[part].to(weights.dtype)
                    grad_weights.mul_(kept)
                    dropped = kept.mul_(weights)
                torch.bmm(dropped.transpose(1, 2), grad[part], out=grad_v[part])
                grad_scores = torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                torch.bmm(grad_scores, k[part], out=grad_q[part])
                torch.bmm(grad_scores.transpose(1, 2), q[part], out=grad_k[part])
            grads.append((grad_q.mul_(ctx.scale), grad_k, grad_v))
        return *(_scatter(parts, ctx) for parts in zip(*grads, strict=True)), None, None, None, None


def _weights(q_GSE: Tensor, k_GSE: Tensor, rectangle: Rectangle) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention weights of a few heads at a time: slice of heads, weights, and a buffer of their size."""
    heads, frames = len(q_GSE), q_GSE.shape[1]
    step = max(1, CACHED // frames**2)
    buffers = q_GSE.new_empty(2, min(step, heads), frames, frames)
    bias_G1S = rectangle.bias_U1S.to(q_GSE.dtype).repeat_interleave(heads // rectangle.shape[0], dim=0)
    for start in range(0, heads, step):
        part = slice(start, min(start + step, heads))
        weights, scores = buffers[:, : part.stop - start]
        torch.bmm(q_GSE[part], k_GSE[part].transpose(1, 2), out=scores)
        yield part, torch.softmax(scores.add_(bias_G1S[part]), dim=-1, out=weights), scores


def _gather(x_NHE: Tensor, index: Tensor, rectangle: Rectangle) -> Tensor:
    """The rows of a rectangle, all heads of all utterances: (G, S, E)."""
    return x_NHE.reshape(-1, x_NHE.shape[2]).index_select(0, index).unflatten(0, (-1, rectangle.shape[1]))


def _head_rows(rectangles: list[Rectangle], position_N: Tensor, heads: int) -> Tensor:
    """Row of each head of each packed frame in the concatenated rectangles of `_gather`."""
    row_P, start = [], 0
    for utterances, frames in (rectangle.shape for rectangle in rectangles):
        stop = start + utterances * frames
        rows_UHS = torch.arange(start * heads, stop * heads, device="cpu").view(-1, heads, frames)
        row_P.append(rows_UHS.transpose(1, 2).reshape(-1, heads))
        start = stop
    return torch.cat(row_P).index_select(0, position_N).flatten()


def _scatter(parts: Sequence[Tensor], ctx) -> Tensor:
    """Packed rows (N, H, E) from rectangles; filler rows become zero."""
    rows = [x.view(-1, x.shape[2]) for x in parts]
    flat = rows[0] if len(rows) == 1 else torch.cat(rows)
    heads = len(ctx.gather[0]) // len(ctx.rectangles[0].index_P)
    out_NHE = flat.index_select(0, ctx.scatter_NH).unflatten(0, (-1, heads))
    out_NHE[ctx.n_valid :] = 0
    return out_NHE
