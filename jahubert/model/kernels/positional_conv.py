"""Positional convolution on packed frames, computed in the frequency domain.

The method is overlap-save with windows of twice the kernel size. Each frequency requires one small matrix
product per group, and the Fourier transforms are matrix products as well. The method takes a quarter of the
operations of a direct convolution with 128 taps. Without gradients, it computes in bfloat16 under autocast to
bfloat16, and otherwise in at least float32, whereas by default, a GPU's own convolution uses TF32. On a CPU,
the direct convolution is used where it is faster, that is, for short batches and, on CPUs with AMX, in lower
precision (autocast).

Shapes: N packed frames, D width, K taps, W windows, F = K + 1 frequencies, G groups, C channels of a group.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.model.kernels.indexing import concat_ranges, index_tensors, to_device_async
from jahubert.model.kernels.packing import SPAN, Packing
from jahubert.model.precision import autocast_dtype, cpu_has_amx

if TYPE_CHECKING:
    from jahubert.model.hubert import PositionalConv


def positional_conv(module: PositionalConv, x_ND: Tensor, packing: Packing) -> Tensor:
    """Apply `module` to packed frames, with zero padding around each utterance."""
    # For short batches, transforming the weights would take more time than it saves.
    short = len(x_ND) < 4 * module.conv.kernel_size[0]
    lower = autocast_dtype(x_ND) is not torch.float32
    if x_ND.device.type == "cpu" and (short or (lower and cpu_has_amx())):
        return _direct(module, x_ND, packing)
    return frequency_domain_conv(module, x_ND, packing)


def _direct(module: PositionalConv, x_ND: Tensor, packing: Packing) -> Tensor:
    x_BSD = F.pad(packing.unpack(x_ND), (0, 0, 0, -packing.width % SPAN))
    n_frames, dtype = x_BSD.shape[1], x_BSD.dtype
    # oneDNN's bfloat16 kernel (torch 2.9.1 and 2.13.0, with AMX) returns wrong results for groups of 4 to
    # 14 channels, as tests/model/test_hubert.py shows.
    lower = torch.is_autocast_enabled("cpu")
    exact = len(module.conv.bias) // module.conv.groups < 16
    with torch.autocast("cpu", enabled=lower and not exact):
        x_BDS = (x_BSD.float() if lower and exact else x_BSD).transpose(1, 2)
        y_BDS = F.gelu(module.conv(x_BDS).to(dtype)[:, :, :n_frames])
    return packing.pack(y_BDS.transpose(1, 2)[:, : packing.width])


def frequency_domain_conv(module: PositionalConv, x_ND: Tensor, packing: Packing) -> Tensor:
    """Compute `PositionalConv.forward` on packed frames as a product of spectra."""
    dtype = autocast_dtype(x_ND)
    # bfloat16 may learn less well (LOG.md), and sums in the spectra could exceed the range of float16.
    if torch.is_grad_enabled() or dtype is not torch.bfloat16:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        y_ND = _correlate(x_ND.to(dtype), module.conv.weight.to(dtype), packing)
        return F.gelu(y_ND + module.conv.bias.to(dtype)).to(x_ND.dtype)


def _correlate(x_ND: Tensor, weight_DCK: Tensor, packing: Packing) -> Tensor:
    width, channels, kernel = weight_DCK.shape
    groups, freqs = width // channels, kernel + 1
    row_X, position_N = _windows(packing, kernel)
    x_WXD = F.pad(x_ND, (0, 0, 0, 1)).index_select(0, row_X).view(-1, 2 * kernel, width)
    forward_PFX, inverse_PXF = (
        to_device_async(torch.from_numpy(table).to(x_ND.dtype), x_ND.device) for table in _fourier(kernel)
    )

    taps_KE = weight_DCK.view(-1, kernel).T
    real, imag = (
        (forward_PFX[part, :, :kernel] @ taps_KE).view(-1, channels, channels).transpose(1, 2)
        for part in range(2)
    )
    spectra = (forward_PFX.flatten(0, 1) @ x_WXD).view(-1, freqs * groups, channels).transpose(0, 1)
    # The spectra are multiplied by the complex conjugate of the weights, because torch's convolution is a
    # correlation.
    by_real, by_imag = (torch.bmm(spectra, part).unflatten(1, (-1, 2)).unbind(2) for part in (real, imag))
    y_real, y_imag = by_real[0] + by_imag[1], by_real[1] - by_imag[0]
    y_XE = inverse_PXF[0] @ y_real.reshape(freqs, -1) + inverse_PXF[1] @ y_imag.reshape(freqs, -1)
    y_WXD = y_XE.view(kernel, groups, -1, channels).permute(2, 0, 1, 3).reshape(-1, width)
    out_ND: Tensor = y_WXD.index_select(0, position_N)
    return out_ND


def _windows(packing: Packing, kernel: int) -> tuple[Tensor, Tensor]:
    """Place windows of 2 K frames every K frames, starting K / 2 frames before each utterance (K: `kernel`).

    The result is the packed row of every frame in all windows, and the position of each packed row among the
    first halves of the windows. Frames outside the utterance get the number of the row of zeros that the
    caller appends to the packed rows.
    """
    n_frames, outside = np.array(packing.n_frames), packing.n_rows
    counts = -(-n_frames // kernel)
    utterance_W = np.repeat(np.arange(packing.n_utterances), counts)
    number_W = concat_ranges(np.zeros_like(counts), counts)
    frame_WX = number_W[:, None] * kernel + np.arange(2 * kernel) - kernel // 2
    inside = (frame_WX >= 0) & (frame_WX < n_frames[utterance_W, None])
    start_B, first_B = (n.cumsum() - n for n in (n_frames, counts))
    row_WX = np.where(inside, start_B[utterance_W, None] + frame_WX, outside)
    filler = np.zeros(packing.n_rows - packing.n_valid)
    position = np.append(concat_ranges(first_B * kernel, n_frames), filler)
    row_X, position_N = index_tensors(packing.index_N.device, row_WX.ravel(), position)
    return row_X, position_N


@lru_cache(maxsize=4)  # numpy arrays are cached, because a cached tensor could be an inference or fake tensor
def _fourier(kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the transform (2, F, 2K) of a window and half of its inverse (2, K, F), real and imaginary."""
    size = 2 * kernel
    angle_FX = np.outer(np.arange(kernel + 1), np.arange(size)) % size * (2 * math.pi / size)
    wave_PFX = np.stack([np.cos(angle_FX), -np.sin(angle_FX)])
    weight_F1 = np.full((kernel + 1, 1), 2 / size)  # each bin also represents its negative frequency
    weight_F1[[0, -1]] = 1 / size  # except for zero and the Nyquist frequency
    inverse_PXF = (wave_PFX * weight_F1)[:, :, :kernel].transpose(0, 2, 1)
    return wave_PFX.astype(np.float32), np.ascontiguousarray(inverse_PXF, np.float32)
