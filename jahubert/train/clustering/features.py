"""Input features for k-means: MFCCs in iteration 1, the output of a HuBERT layer in later iterations.

The MFCCs are defined as in fairseq's recipe (Kaldi MFCCs of samples in [-1, 1], with deltas and
delta-deltas), so that labels are comparable with published ones. The range of the samples matters: with int16
samples, as usual in Kaldi, near-silence would not reach the floor of the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jahubert.errors import ConfigError
from jahubert.frames import MFCC, SAMPLE_RATE, FrameGrid
from jahubert.model.hubert import HubertModel
from jahubert.model.kernels.indexing import to_device_async
from jahubert.model.precision import DTYPES, autocast

_FFT = 512
_MEL_BINS, _LOW_HZ, _HIGH_HZ = 23, 20.0, SAMPLE_RATE / 2
_CEPSTRA, _LIFTER = 13, 22
_PREEMPHASIS = 0.97
_LOG_FLOOR = torch.finfo(torch.float32).eps


class Feature(Protocol):
    """Protocol of a feature extractor. The frames of an utterance must not depend on other utterances."""

    name: str
    dim: int
    grid: FrameGrid

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the frames of each waveform.

        Args:
            wavs: mono 16 kHz float32 waveforms (T,).

        Returns:
            One float32 tensor (S, dim) per waveform, with S = grid.n_frames(T), which may be 0.
        """
        ...


class Mfcc:
    """13 Kaldi MFCCs including C0, their deltas and delta-deltas: 39 values every 10 ms."""

    name = "mfcc"
    dim = 3 * _CEPSTRA
    grid = MFCC

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        # Number of frames per block. On a CPU, the spectra of a block fit in the L2 cache.
        self.block = 256 if self.device.type == "cpu" else 16_384
        # The tables are computed in float64, so that the rounded float32 values are equal on every machine.
        window_T = torch.hann_window(self.grid.window, periodic=False, dtype=torch.float64) ** 0.85  # "povey"
        self.window_T = window_T.float().to(self.device)
        # Each row is repeated, because the spectrum has separate real and imaginary parts for each bin.
        self.mel_FM = _mel_filters().repeat_interleave(2, dim=0).float().to(self.device)
        self.cepstra_MC = _cepstra().float().to(self.device)

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the features of all utterances at once. Results do not depend on the batch."""
        hop, window = self.grid.hop, self.grid.window
        # Utterances are concatenated, each starting at a multiple of the hop, so that one strided view
        # contains all frames. Frames that span two utterances are discarded.
        hops = [-(-len(wav_T) // hop) for wav_T in wavs]
        rows = -(-sum(hops) // self.block) * self.block
        raw_T = torch.zeros(rows * hop + window)
        starts = [0, *accumulate(hops)]
        for wav_T, start in zip(wavs, starts, strict=False):
            raw_T[start * hop : start * hop + len(wav_T)] = wav_T
        raw_T = to_device_async(raw_T, self.device)
        with torch.no_grad():
            static_SC = self._static(raw_T, rows)
            features = []
            for wav_T, start in zip(wavs, starts, strict=False):
                mfcc_SC = static_SC[start : start + self.grid.n_frames(len(wav_T))]
                delta_SC = deltas(mfcc_SC) if len(mfcc_SC) else mfcc_SC
                delta_delta_SC = deltas(delta_SC) if len(mfcc_SC) else mfcc_SC
                features.append(torch.cat([mfcc_SC, delta_SC, delta_delta_SC], dim=1))
        return features

    def _static(self, raw_T: Tensor, rows: int) -> Tensor:
        """Compute the static cepstra (rows, 13) of the frames that start at each multiple of the hop."""
        window, hop = self.grid.window, self.grid.hop
        static_SC = raw_T.new_empty(rows, _CEPSTRA)
        for start in range(0, rows, self.block):
            block_T = raw_T[start * hop : (start + self.block - 1) * hop + window]
            # Kaldi subtracts the mean of a frame and then applies pre-emphasis. Because pre-emphasis is
            # linear, it can be applied to a whole block, before (1 - 0.97) * mean is subtracted per frame.
            emphasized_T = F.pad(torch.sub(block_T[1:], block_T[:-1], alpha=_PREEMPHASIS), (1, 0))
            mel_SM = self._mel(block_T.unfold(0, window, hop), emphasized_T.unfold(0, window, hop))
            log_SM = mel_SM.clamp_(min=_LOG_FLOOR).log_()
            torch.mm(log_SM, self.cepstra_MC, out=static_SC[start : start + self.block])
        return static_SC

    def _mel(self, raw_SW: Tensor, emphasized_SW: Tensor) -> Tensor:
        rest = 1 - _PREEMPHASIS
        mean_S1 = raw_SW.mean(dim=1, keepdim=True)
        frames_SF = raw_SW.new_zeros(len(raw_SW), _FFT)
        windowed_SW = frames_SF[:, : self.grid.window]
        torch.sub(emphasized_SW, mean_S1, alpha=rest, out=windowed_SW)
        # In Kaldi, the predecessor of the first sample of a frame is that sample itself.
        windowed_SW[:, 0] = (raw_SW[:, 0] - mean_S1[:, 0]) * rest
        windowed_SW *= self.window_T
        spectrum_SF = torch.view_as_real(torch.fft.rfft(frames_SF)).flatten(1)
        return spectrum_SF.square_() @ self.mel_FM


def deltas(x_SC: Tensor) -> Tensor:
    """Compute deltas over five frames, repeating edge frames, like torchaudio's `compute_deltas`."""
    padded = torch.cat([x_SC[:1], x_SC[:1], x_SC, x_SC[-1:], x_SC[-1:]])
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10


def _mel_filters() -> Tensor:
    """Return 23 triangular filters (257, 23), evenly spaced on Kaldi's mel scale 1127 ln(1 + f / 700)."""
    bins_F = torch.arange(_FFT // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE / _FFT)
    mel_F1 = (1127.0 * torch.log1p(bins_F / 700.0))[:, None]
    low, high = (1127.0 * math.log1p(hz / 700.0) for hz in (_LOW_HZ, _HIGH_HZ))
    step = (high - low) / (_MEL_BINS + 1)
    left_M = low + step * torch.arange(_MEL_BINS, dtype=torch.float64)
    weights = torch.minimum(mel_F1 - left_M, left_M + 2 * step - mel_F1).clamp(min=0) / step
    weights[-1] = 0  # Kaldi excludes the Nyquist bin
    return weights


def _cepstra() -> Tensor:
    """Return the orthonormal DCT-II and the cepstral lifter, combined into one matrix (23, 13)."""
    order_C = torch.arange(_CEPSTRA, dtype=torch.float64)
    center_M1 = torch.arange(_MEL_BINS, dtype=torch.float64)[:, None] + 0.5
    dct_MC = torch.cos(math.pi / _MEL_BINS * center_M1 * order_C) * math.sqrt(2.0 / _MEL_BINS)
    dct_MC[:, 0] = math.sqrt(1.0 / _MEL_BINS)
    return dct_MC * (1 + 0.5 * _LIFTER * torch.sin(math.pi * order_C / _LIFTER))


class HubertLayer:
    """Feature extractor that returns the output of one Transformer layer of a HuBERT model.

    Args:
        layer: number of the layer, counted from 1.
        precision: fp32 or, with autocast, bf16. The features are always returned in float32.

    Raises:
        ConfigError: `layer` is out of range.
    """

    name = "hubert"

    def __init__(
        self, model: HubertModel, layer: int, device: str | torch.device = "cpu", precision: str = "fp32"
    ):
        if not 1 <= layer <= model.config.layers:
            raise ConfigError(f"layer is {layer}, but the model has layers 1 to {model.config.layers}")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.layer, self.precision = layer, precision
        self.dim: int = model.config.width
        self.grid: FrameGrid = model.config.grid

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        features = [torch.zeros(0, self.dim, device=self.device) for _ in wavs]
        # The model rejects waveforms shorter than one frame. They yield no frames, as with MFCCs.
        long_enough = [i for i, wav_T in enumerate(wavs) if self.grid.n_frames(len(wav_T)) > 0]
        if not long_enough:
            return features
        n_samples = [len(wavs[i]) for i in long_enough]
        # The waveforms are padded on the device, so that no padding is transferred to it.
        wav_T = to_device_async(torch.cat([wavs[i] for i in long_enough]), self.device)
        wav_BT = torch.nn.utils.rnn.pad_sequence(list(wav_T.split(n_samples)), batch_first=True)
        with torch.no_grad(), autocast(DTYPES[self.precision], self.device):
            encoded = self.model(wav_BT, n_samples, last_layer=self.layer)
        for row, i in enumerate(long_enough):
            features[i] = encoded.hidden_BSD[row, : self.grid.n_frames(n_samples[row])].float()
        return features
