"""Self-attention on packed frames, within each utterance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jahubert.model.kernels.dispatch import is_tracing, is_transformed
from jahubert.model.kernels.double_backward import with_double_backward
from jahubert.model.kernels.dropout import keep_mask, keep_probability
from jahubert.model.kernels.packing import Packing, Rectangle
from jahubert.model.kernels.products import product
from jahubert.model.kernels.weights import linear
from jahubert.model.precision import autocast_dtype

if TYPE_CHECKING:
    from jahubert.model.hubert import Attention

MAX_FLASH_WIDTH = 192  # largest head width with a flash attention backward pass on all supported GPUs
CACHED = 2**19  # number of attention weights computed at a time on a CPU, so that they fit in its caches


def fused_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without cuDNN's attention kernel, which needs a new plan for every size."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def self_attention(module: Attention, x_ND: Tensor, packing: Packing) -> Tensor:
    """Apply the attention layer `module` to packed frames."""
    projections = module.q_proj, module.k_proj, module.v_proj
    if torch.is_grad_enabled():
        # With concatenated weights, queries, keys and values need one product instead of three, and two
        # instead of six in the backward pass.
        q_NHE, k_NHE, v_NHE = linear(x_ND, *projections).unflatten(1, (3, module.heads, -1)).unbind(1)
    else:
        x_ND = x_ND.to(autocast_dtype(x_ND))  # one cast here replaces a cast in each of the three products
        q_NHE, k_NHE, v_NHE = (
            product(x_ND, project.weight, project.bias).unflatten(1, (module.heads, -1))
            for project in projections
        )
    dropout = module.dropout if module.training else 0.0
    out_ND = attend(q_NHE, k_NHE, v_NHE, packing, dropout).flatten(1)
    return linear(out_ND, module.out_proj)


def attend(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, dropout: float) -> Tensor:
    """Compute scaled dot-product attention on packed queries, keys and values (N, heads, head width)."""
    if packing.flash is not None and flash_supports(q_NHE.dtype, q_NHE.shape[2]):
        out_NHE = flash_attention(q_NHE, k_NHE, v_NHE, *packing.flash, dropout)
        plain = _unfused(partial(_by_utterance, packing=packing), dropout)
        return with_double_backward(out_NHE, plain, q_NHE, k_NHE, v_NHE)
    if not torch.is_grad_enabled() and packing.efficient is not None and _has_efficient_attention(q_NHE):
        return efficient_attention(q_NHE, k_NHE, v_NHE, *packing.efficient, dropout)
    if packing.fused_attention:
        q, k, v = (packing.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
        out = scaled_dot_product_attention(q, k, v, packing.mask_B11S, dropout)
        return packing.pack(out.transpose(1, 2))
    # torch's fused CPU kernel has no dropout, and it is slow in bfloat16.
    if q_NHE.dtype is torch.bfloat16 or dropout:
        return _in_rectangles(q_NHE, k_NHE, v_NHE, packing, dropout)
    # Calling the fused kernel once per utterance avoids computing attention for padding.
    by_utterance = partial(_by_utterance, packing=packing)
    out_NHE = by_utterance(q_NHE, k_NHE, v_NHE)
    return with_double_backward(out_NHE, _unfused(by_utterance), q_NHE, k_NHE, v_NHE)


def flash_supports(dtype: torch.dtype, head_width: int) -> bool:
    """Return whether flash attention supports queries of this dtype and width."""
    return dtype in (torch.bfloat16, torch.float16) and head_width % 8 == 0 and head_width <= MAX_FLASH_WIDTH


def _has_efficient_attention(q_NHE: Tensor) -> bool:
    """Return whether `efficient_attention` supports the head width of a tensor, which must be float32."""
    return q_NHE.dtype is torch.float32 and q_NHE.shape[2] % 4 == 0


def scaled_dot_product_attention(
    q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Call torch's function, with support for forward-mode and higher derivatives.

    torch's fused kernels provide only the first derivative. After a fused kernel with dropout, a double
    backward raises a RuntimeError.
    """
    compute = partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=dropout)
    if is_tracing() or not _has_fused_kernels():
        return compute(q_BHSE, k_BHSE, v_BHSE)
    if is_transformed():
        with sdpa_kernel(SDPBackend.MATH):
            return compute(q_BHSE, k_BHSE, v_BHSE)
    out_BHSE = compute(q_BHSE, k_BHSE, v_BHSE)
    if dropout and q_BHSE.device.type == "cpu":
        return out_BHSE  # no fused kernel was used
    return with_double_backward(out_BHSE, _unfused(compute, dropout), q_BHSE, k_BHSE, v_BHSE)


def _has_fused_kernels() -> bool:
    """Return whether any fused kernel is enabled (see `sdpa_kernel`)."""
    cuda = torch.backends.cuda
    return bool(cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def _unfused(compute: Callable[..., Tensor], dropout: float = 0.0) -> Callable[..., Tensor]:
    """Wrap `compute` so that it uses differentiable operators or, with dropout, raises a RuntimeError."""

    def unfused(*inputs: Tensor) -> Tensor:
        if dropout:
            raise RuntimeError(
                "fused attention with dropout has no double backward, because its dropout mask is lost. "
                "Set attention_dropout to 0, or run the forward pass inside "
                "`with jahubert.model.kernels.disabled():`"
            )
        with sdpa_kernel(SDPBackend.MATH):
            return compute(*inputs)

    return unfused


def _by_utterance(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing) -> Tensor:
    """Compute attention with one call per utterance and one for the filler rows."""
    parts = [*packing.n_frames, packing.n_rows - packing.n_valid]
    rows = zip(*(x.transpose(0, 1)[None].split(parts, dim=2) for x in (q_NHE, k_NHE, v_NHE)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v) for q, k, v in rows]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def flash_attention(
    q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, offsets: Tensor, longest: int, dropout: float
) -> Tensor:
    """Compute attention within each concatenated sequence with FlashAttention-2 (arXiv 2307.08691).

    `torch.nn.attention.varlen` has offered this operator since torch 2.10, but without dropout.
    """
    out_NHE: Tensor = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NHE, v_NHE, offsets, offsets, longest, longest, dropout, False, False
    )[0]
    return out_NHE


def efficient_attention(
    q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, offsets: Tensor, longest: int, dropout: float
) -> Tensor:
    """Compute attention within each concatenated sequence with torch's memory-efficient kernel, no gradient.

    Unlike flash attention, this kernel supports float32.
    """
    out_1NHE: Tensor = torch.ops.aten._efficient_attention_forward(
        q_NHE[None], k_NHE[None], v_NHE[None], None, offsets, offsets, longest, longest, dropout, 0
    )[0]
    return out_1NHE[0]


class _Layout(NamedTuple):
    """Positions of packed frames in rectangles, for each head."""

    rectangles: list[Rectangle]
    indices: list[Tensor]  # for each rectangle, the row in (N, H) of each utterance, head and frame
    row_NH: Tensor  # row of each frame and head in the concatenated rectangles
    n_valid: int  # number of packed rows without the filler rows

    @classmethod
    def of(cls, packing: Packing, heads: int) -> _Layout:
        rectangles, position_N = packing.rectangles
        indices, row_P, start = [], [], 0
        for rectangle in rectangles:
            utterances, frames = rectangle.shape
            index_U1S = rectangle.index_P.view(utterances, 1, frames)
            indices.append((index_U1S * heads + torch.arange(heads, device="cpu")[:, None]).flatten())
            stop = start + utterances * frames
            row_UHS = torch.arange(start * heads, stop * heads, device="cpu").view(-1, heads, frames)
            row_P.append(row_UHS.transpose(1, 2).reshape(-1, heads))
            start = stop
        row_NH = torch.cat(row_P).index_select(0, position_N)
        return cls(rectangles, indices, row_NH, packing.n_valid)


def _in_rectangles(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, dropout: float) -> Tensor:
    """Compute attention with matrix products on rectangles (G, S, E), where G = utterances * heads."""
    _, heads, width = q_NHE.shape
    layout = _Layout.of(packing, heads)
    # Queries and, to preserve the mean under dropout, values are scaled before the products.
    scaled = q_NHE * width**-0.5, k_NHE, v_NHE * (1 / keep_probability(dropout)) if dropout else v_NHE
    inputs = zip(*(_ToRectangles.apply(x, layout, False) for x in scaled), strict=True)
    outs = []
    for rectangle, (q, k, v) in zip(layout.rectangles, inputs, strict=True):
        bias_G1S = rectangle.bias_U1S.to(q.dtype).repeat_interleave(heads, dim=0)
        keep = keep_mask((len(q), q.shape[1], q.shape[1]), dropout) if dropout else None
        out = _RectangleAttention.apply(q, k, v, bias_G1S, keep)
        outs.append(with_double_backward(out, partial(_biased_attention, bias_G1S, keep), q, k, v))
    out_NHE: Tensor = _FromRectangles.apply(layout, *outs)
    return out_NHE


class _ToRectangles(torch.autograd.Function):
    """Function from packed rows (N, H, E) to rectangles (G, S, E), padded with zeros or with the first row.

    The padding has no gradient: the weights of its keys are zero, and the outputs of its queries are unused.
    """

    @staticmethod
    def forward(ctx: Any, x_NHE: Tensor, layout: _Layout, zeros: bool) -> tuple[Tensor, ...]:
        ctx.layout = layout
        rows, parts = x_NHE.reshape(-1, x_NHE.shape[2]), []
        for rectangle, index in zip(layout.rectangles, layout.indices, strict=True):
            utterances, frames = rectangle.shape
            part_GSE = rows.index_select(0, index).unflatten(0, (-1, frames))
            if zeros:
                valid_U1S1 = rectangle.bias_U1S.exp()[..., None].to(part_GSE.dtype)
                part_GSE.unflatten(0, (utterances, -1)).mul_(valid_U1S1)
            parts.append(part_GSE)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _FromRectangles.apply(ctx.layout, *grads), None, None


class _FromRectangles(torch.autograd.Function):
    """Function from rectangles (G, S, E) to packed rows (N, H, E), in which filler rows are zero."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *parts: Tensor) -> Tensor:
        ctx.layout = layout
        rows = [x_GSE.reshape(-1, x_GSE.shape[2]) for x_GSE in parts]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        out_NHE: Tensor = flat.index_select(0, layout.row_NH.flatten()).unflatten(0, layout.row_NH.shape)
        out_NHE[layout.n_valid :] = 0
        return out_NHE

    @staticmethod
    def backward(ctx: Any, grad_NHE: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_ToRectangles.apply(grad_NHE, ctx.layout, True)


def _biased_attention(
    bias_G1S: Tensor, keep: Tensor | None, q_GSE: Tensor, k_GSE: Tensor, v_GSE: Tensor
) -> Tensor:
    weights = torch.softmax(q_GSE @ k_GSE.transpose(1, 2) + bias_G1S, dim=-1)
    return (weights if keep is None else weights * keep) @ v_GSE


class _RectangleAttention(torch.autograd.Function):
    """`_biased_attention` for CPUs, where torch's fused kernel has no dropout and is slow in bfloat16.

    A few heads are computed at a time, so that intermediate results remain in the cache. For the backward
    pass, one byte of dropout mask per weight is stored, and the weights are recomputed.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_G1S: Tensor, keep: Tensor | None) -> Tensor:
        out = torch.empty_like(v)
        for part, weights, _ in _weights(q, k, bias_G1S):
            torch.bmm(weights if keep is None else weights.mul_(keep[part]), v[part], out=out[part])
        ctx.save_for_backward(q, k, v, bias_G1S, keep)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias_G1S, keep = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for part, weights, buffer in _weights(q, k, bias_G1S):
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
        return grad_q, grad_k, grad_v, None, None


def _weights(q_GSE: Tensor, k_GSE: Tensor, bias_G1S: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of heads, attention weights, buffer) for a few heads at a time."""
    heads, frames = len(q_GSE), q_GSE.shape[1]
    step = max(1, CACHED // frames**2)
    buffers = q_GSE.new_empty(2, min(step, heads), frames, frames)
    for start in range(0, heads, step):
        part = slice(start, min(start + step, heads))
        weights, scores = buffers[:, : part.stop - start]
        torch.bmm(q_GSE[part], k_GSE[part].transpose(1, 2), out=scores)
        yield part, torch.softmax(scores.add_(bias_G1S[part]), dim=-1, out=weights), scores
