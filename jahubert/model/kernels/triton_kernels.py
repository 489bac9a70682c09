"""Triton kernels for the memory-bound operations between the matrix products of a training step (CUDA).

The module needs the package triton, which torch's CUDA builds install. `dispatch.triton_kernels_for` imports
it and decides where the kernels are used. All tensors must be contiguous. The kernels compute in float32,
whatever the dtypes of the tensors.

Shapes: N rows, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from jahubert.model.kernels.dropout import threshold

TILE = 2048  # number of elements that a program of the norm processes at a time
WARPS = 8  # per program of the norm, so that a thread processes 8 elements at a time
RESIDENT = 3  # programs of the norm's backward pass that run on a multiprocessor (80 registers per thread)
PARTS = 64  # number of partial sums of a column
SPAN = 1024  # number of elements per program of GELU


def residual_norm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute residual + dropout(x), its layer norm, and the mean and inverse deviation (2, N) of the rows.

    Args:
        seed: int64 tensor with one element, which determines the dropout mask, or None without dropout.
        p: probability of dropout, which is rounded to a multiple of 2**-16.
    """
    n, width = x_ND.shape
    sum_ND, normed_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    moments_2N = x_ND.new_empty(2, n, dtype=torch.float32)
    block, rows = _tile(width)
    with torch.cuda.device_of(x_ND):
        _residual_norm[(triton.cdiv(n, rows),)](
            x_ND, residual_ND, weight_D, bias_D, seed, sum_ND, normed_ND, moments_2N, n, eps,
            width, block, rows, threshold(p), num_warps=WARPS,
        )  # fmt: skip
    return sum_ND, normed_ND, moments_2N


def residual_norm_backward(
    grad_normed_ND: Tensor,
    grad_sum_ND: Tensor | None,
    sum_ND: Tensor,
    weight_D: Tensor,
    moments_2N: Tensor,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to x, the residual, and weight and bias (2, D)."""
    n, width = sum_ND.shape
    grad_residual_ND = torch.empty_like(sum_ND)
    grad_x_ND = torch.empty_like(sum_ND) if threshold(p) else grad_residual_ND
    block, rows = _tile(width)
    programs = min(RESIDENT * _multiprocessors(sum_ND.device), triton.cdiv(n, rows))
    partial_P2D = moments_2N.new_empty(programs, 2, width)
    with torch.cuda.device_of(sum_ND):
        _residual_norm_backward[(programs,)](
            grad_normed_ND, grad_sum_ND, sum_ND, weight_D, moments_2N, seed, grad_x_ND, grad_residual_ND,
            partial_P2D, n, width, block, rows, threshold(p), num_warps=WARPS,
        )  # fmt: skip
        return grad_x_ND, grad_residual_ND, _sum_parts(partial_P2D, weight_D.dtype)


def dropout_scale(like_ND: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Return the factors by which the dropout of `residual_norm` multiplies x, in float32."""
    ones_ND = torch.ones_like(like_ND, dtype=torch.float32)
    return residual_norm(ones_ND, torch.zeros_like(ones_ND), ones_ND[0], ones_ND[0], 1.0, seed, p)[0]


def gelu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return GELU(x), and multiply `grad` by the derivative of GELU in place."""
    gelu, n = torch.empty_like(x), x.numel()
    with torch.cuda.device_of(x):
        _gelu_backward[(triton.cdiv(n, SPAN),)](x, grad, gelu, n, SPAN)
    return gelu


def column_sum(x_ND: Tensor) -> Tensor:
    """Compute x.sum(0) in the dtype of x."""
    n, width = x_ND.shape
    partial_PD = x_ND.new_empty(PARTS, width, dtype=torch.float32)
    with torch.cuda.device_of(x_ND):
        _column_sum[(triton.cdiv(width, 128), PARTS)](x_ND, partial_PD, n, width, 128, 32)
        return _sum_parts(partial_PD, x_ND.dtype)


def run_all(device: torch.device, dtype: torch.dtype) -> None:
    """Run every kernel on a small tensor, so that errors in compilation occur before training."""
    x_ND = torch.ones(2, 8, dtype=dtype, device=device)
    weight_D = torch.ones(8, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    sum_ND, normed_ND, moments_2N = residual_norm(x_ND, x_ND, weight_D, weight_D, 1e-5, seed, 0.1)
    residual_norm_backward(normed_ND, x_ND, sum_ND, weight_D, moments_2N, seed, 0.1)
    gelu_backward(x_ND, torch.ones_like(x_ND))
    column_sum(x_ND)


def _sum_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum a float32 tensor over its first dimension."""
    total = partial.new_empty(partial.shape[1:], dtype=dtype)
    width = total.numel()
    _column_sum[(triton.cdiv(width, 32), 1)](partial, total, len(partial), width, 32, 128)
    return total


def _tile(width: int) -> tuple[int, int]:
    """Return the width of a tile, which is a power of two, and its number of rows."""
    block = max(8, triton.next_power_of_2(width))
    return block, max(1, TILE // block)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter of triton
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _keep_mask(seed, row_R1, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr):
    """Draw the dropout mask (R, BLOCK) of some rows, with sixteen random bits per element."""
    group_RG = row_R1 * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), group_RG)  # 128 bits
    words = tl.join(tl.join(a, b), tl.join(c, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [row_R1.shape[0], BLOCK]) >= THRESHOLD


@triton.jit(do_not_specialize=["n_rows"])
def _residual_norm(
    x_ND, residual_ND, weight_D, bias_D, seed, sum_ND, normed_ND, moments_2N, n_rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row_R1 = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column_1D = tl.arange(0, BLOCK)[None, :]
    offset_RD = row_R1.to(tl.int64) * WIDTH + column_1D
    valid_1D, valid_R1 = column_1D < WIDTH, row_R1 < n_rows
    valid_RD = valid_R1 & valid_1D
    total = tl.load(x_ND + offset_RD, mask=valid_RD, other=0.0).to(tl.float32)
    if THRESHOLD:
        keep_RD = _keep_mask(seed, row_R1, BLOCK, THRESHOLD)
        total = tl.where(keep_RD, total * (65536 / (65536 - THRESHOLD)), 0.0)
    total += tl.load(residual_ND + offset_RD, mask=valid_RD, other=0.0).to(tl.float32)
    rounded = total.to(sum_ND.dtype.element_ty)
    tl.store(sum_ND + offset_RD, rounded, mask=valid_RD)
    total = rounded.to(tl.float32)  # the backward pass reads the rounded sum
    mean_R1 = tl.sum(total, axis=1, keep_dims=True) / WIDTH
    centered = tl.where(valid_1D, total - mean_R1, 0.0)
    variance_R1 = tl.sum(centered * centered, axis=1, keep_dims=True) / WIDTH
    rstd_R1 = tl.rsqrt(variance_R1 + eps)
    weight_1D = tl.load(weight_D + column_1D, mask=valid_1D, other=0.0).to(tl.float32)
    bias_1D = tl.load(bias_D + column_1D, mask=valid_1D, other=0.0).to(tl.float32)
    normed = centered * rstd_R1 * weight_1D + bias_1D
    tl.store(normed_ND + offset_RD, normed, mask=valid_RD)
    tl.store(moments_2N + row_R1, mean_R1, mask=valid_R1)
    tl.store(moments_2N + n_rows + row_R1, rstd_R1, mask=valid_R1)


@triton.jit(do_not_specialize=["n_rows"])
def _residual_norm_backward(
    grad_normed_ND, grad_sum_ND, sum_ND, weight_D, moments_2N, seed, grad_x_ND, grad_residual_ND,
    partial_P2D, n_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    column_1D = tl.arange(0, BLOCK)[None, :]
    valid_1D = column_1D < WIDTH
    weight_1D = tl.load(weight_D + column_1D, mask=valid_1D, other=0.0).to(tl.float32)
    grad_weight_RD = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias_RD = tl.zeros([ROWS, BLOCK], tl.float32)
    start = tl.program_id(0) * ROWS
    while start < n_rows:  # the interpreter of triton has no `range` for tensors with numpy 2.4
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        offset_RD = row_R1.to(tl.int64) * WIDTH + column_1D
        valid_R1 = row_R1 < n_rows
        valid_RD = valid_R1 & valid_1D
        grad = tl.load(grad_normed_ND + offset_RD, mask=valid_RD, other=0.0).to(tl.float32)
        total = tl.load(sum_ND + offset_RD, mask=valid_RD, other=0.0).to(tl.float32)
        mean_R1 = tl.load(moments_2N + row_R1, mask=valid_R1, other=0.0)
        rstd_R1 = tl.load(moments_2N + n_rows + row_R1, mask=valid_R1, other=0.0)
        standard = tl.where(valid_1D, (total - mean_R1) * rstd_R1, 0.0)
        grad_weight_RD += grad * standard
        grad_bias_RD += grad
        grad *= weight_1D
        mean_grad_R1 = tl.sum(grad, axis=1, keep_dims=True) / WIDTH
        projection_R1 = tl.sum(grad * standard, axis=1, keep_dims=True) / WIDTH
        grad = (grad - mean_grad_R1 - standard * projection_R1) * rstd_R1
        if grad_sum_ND is not None:
            grad += tl.load(grad_sum_ND + offset_RD, mask=valid_RD, other=0.0).to(tl.float32)
        tl.store(grad_residual_ND + offset_RD, grad, mask=valid_RD)
        if THRESHOLD:
            keep_RD = _keep_mask(seed, row_R1, BLOCK, THRESHOLD)
            grad = tl.where(keep_RD, grad * (65536 / (65536 - THRESHOLD)), 0.0)
            tl.store(grad_x_ND + offset_RD, grad, mask=valid_RD)
        start += tl.num_programs(0) * ROWS
    offset_1D = tl.program_id(0) * (2 * WIDTH) + column_1D
    tl.store(partial_P2D + offset_1D, tl.sum(grad_weight_RD, axis=0, keep_dims=True), mask=valid_1D)
    tl.store(partial_P2D + offset_1D + WIDTH, tl.sum(grad_bias_RD, axis=0, keep_dims=True), mask=valid_1D)


@triton.jit
def _gelu_backward(x_X, grad_X, gelu_X, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < n
    x = tl.load(x_X + offset, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(grad_X + offset, mask=valid, other=0.0).to(tl.float32)
    # With the distribution function P and the density p of the normal distribution, GELU(x) is x P(x), and
    # its derivative P(x) + x p(x).
    probability = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(gelu_X + offset, x * probability, mask=valid)
    tl.store(grad_X + offset, grad * (probability + x * density), mask=valid)


@triton.jit(do_not_specialize=["n_rows"])
def _column_sum(
    x_ND, sum_PD, n_rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    column_1C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid_1C = column_1C < WIDTH
    total_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = tl.program_id(1) * ROWS
    while start < n_rows:
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        offset_RC = row_R1.to(tl.int64) * WIDTH + column_1C
        total_RC += tl.load(x_ND + offset_RC, mask=(row_R1 < n_rows) & valid_1C, other=0.0).to(tl.float32)
        start += tl.num_programs(1) * ROWS
    offset_1C = tl.program_id(1) * WIDTH + column_1C
    tl.store(sum_PD + offset_1C, tl.sum(total_RC, axis=0, keep_dims=True), mask=valid_1C)
