"""The positional convolution: wide and grouped, its output tells each frame where it is (wav2vec 2.0).

It is computed in the frequency domain: windows of two kernels' length (overlap-save), each frequency one
small matrix product a group. The Fourier transforms are matrix products as well; a quarter of the arithmetic
of the plain sum over 128 taps, and less rounding. In float32 always: a GPU's own convolution would round to
ten bits. The plain sum is left where it is faster: in bfloat16 on a CPU, and on short batches.

Shapes: N packed frames, D width, K taps, W windows, F = K + 1 frequencies, G groups, C channels of a group.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from jahubert.model.kernels.indexing import to_device_async
from jahubert.model.packing import SPAN, Packing
from jahubert.model.precision import autocast_dtype


class PositionalConv(nn.Module):
    """Packed frames (N, D) to packed frames; every utterance sees zeros around itself."""

    def __init__(self, width: int, kernel: int, groups: int):
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(cast(Tensor, conv.bias))
        self.conv = weight_norm(conv, dim=2)
        self.extra = 1 - kernel % 2  # an even kernel gives one frame too many

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        on_cpu = x_ND.device.type == "cpu"
        # On short batches transforming the weights would cost more than is saved.
        if on_cpu and (autocast_dtype(x_ND) is not torch.float32 or len(x_ND) < 4 * self.conv.kernel_size[0]):
            return self._plain(x_ND, packing)
        with torch.autocast(x_ND.device.type, enabled=False):
            y_ND = F.gelu(self._by_frequencies(x_ND.float(), packing) + self.conv.bias)
        return y_ND.to(x_ND.dtype)

    def _plain(self, x_ND: Tensor, packing: Packing) -> Tensor:
        x_BSD = F.pad(packing.unpack(x_ND), (0, 0, 0, -packing.width % SPAN))
        # oneDNN's bfloat16 kernel (torch 2.9.1 and 2.13.0, with AMX) is wrong for groups of 4 to 14 channels:
        # tests/model/test_hubert.py would see it.
        exact = self.conv.weight.shape[1] < 16
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not exact):
            y_BDS = self.conv((x_BSD.float() if exact else x_BSD).transpose(1, 2)).to(x_BSD.dtype)
        y_BDS = F.gelu(y_BDS[:, :, : y_BDS.shape[2] - self.extra])
        return packing.pack(y_BDS.transpose(1, 2)[:, : packing.width])

    def _by_frequencies(self, x_ND: Tensor, packing: Packing) -> Tensor:
        weight_DCK = self.conv.weight
        width, channels, kernel = weight_DCK.shape
        groups, freqs = width // channels, kernel + 1
        there_X, back_N = packing.windows(kernel)
        x_WXD = F.pad(x_ND, (0, 0, 0, 1)).index_select(0, there_X).view(-1, 2 * kernel, width)
        forth_PFX, back_PXF = (
            to_device_async(torch.from_numpy(table), x_ND.device) for table in _fourier(kernel)
        )

        taps_KE = weight_DCK.view(-1, kernel).T
        real, imag = (
            (forth_PFX[part, :, :kernel] @ taps_KE).view(-1, channels, channels).transpose(1, 2)
            for part in range(2)
        )
        spectra = (forth_PFX.flatten(0, 1) @ x_WXD).view(-1, freqs * groups, channels).transpose(0, 1)
        # times the conjugate of the weights: a correlation
        by_real, by_imag = (torch.bmm(spectra, part).unflatten(1, (-1, 2)).unbind(2) for part in (real, imag))
        y_real, y_imag = by_real[0] + by_imag[1], by_real[1] - by_imag[0]
        y_XE = back_PXF[0] @ y_real.reshape(freqs, -1) + back_PXF[1] @ y_imag.reshape(freqs, -1)
        y_WXD = y_XE.view(kernel, groups, -1, channels).permute(2, 0, 1, 3).reshape(-1, width)
        return y_WXD.index_select(0, back_N)


@lru_cache(maxsize=4)  # as numpy's arrays: a tensor would remember the mode that it was made in
def _fourier(kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary parts (2, F, 2K) of a window's transform, and back (2, K, F) to its first half."""
    size = 2 * kernel
    angle_FX = np.outer(np.arange(kernel + 1), np.arange(size)) % size * (2 * math.pi / size)
    wave_PFX = np.stack([np.cos(angle_FX), -np.sin(angle_FX)])
    share_F1 = np.full((kernel + 1, 1), 2 / size)  # a frequency and its mirror image
    share_F1[[0, -1]] = 1 / size  # which these two are themselves
    back_PXF = (wave_PFX * share_F1)[:, :, :kernel].transpose(0, 2, 1)
    return wave_PFX.astype(np.float32), np.ascontiguousarray(back_PXF, np.float32)
