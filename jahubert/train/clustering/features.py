"""What k-means sees: 39 MFCCs of iteration 1, or a layer of the model of the iteration before.

The MFCCs are those of fairseq's recipe (Kaldi's, on samples in [-1, 1], plus two deltas), so that
labels can be compared with published ones. Kaldi's own int16 scale gives other features: near-silence
meets the floor of the logarithm here and does not there.
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

_FFT = 512
_MEL_BINS, _LOW_HZ, _HIGH_HZ = 23, 20.0, SAMPLE_RATE / 2
_CEPSTRA, _LIFTER = 13, 22
_PREEMPHASIS = 0.97
_LOG_FLOOR = torch.finfo(torch.float32).eps


class Feature(Protocol):
    """Waveforms -> frames. The result of an utterance does not depend on its neighbours in the list."""

    name: str
    dim: int
    grid: FrameGrid

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Mono 16 kHz float32 waveforms (T,) -> float32 (S, dim) each; S = grid.n_frames(T), possibly 0."""
        ...


class Mfcc:
    """13 Kaldi MFCCs with C0, their deltas and the deltas of those: 39 numbers every 10 ms."""

    name = "mfcc"
    dim = 3 * _CEPSTRA
    grid = MFCC

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.block = (
            256 if self.device.type == "cpu" else 16_384
        )  # frames: with their spectra in the L2 cache
        # Made in float64: the tables are exact to float32's last bit on every machine.
        window_T = torch.hann_window(self.grid.window, periodic=False, dtype=torch.float64) ** 0.85  # "povey"
        self.window_T = window_T.float().to(self.device)
        # Every row twice: the filters add up the squared real and imaginary parts in the same product.
        self.mel_FM = _mel_filters().repeat_interleave(2, dim=0).float().to(self.device)
        self.cepstra_MC = _cepstra().float().to(self.device)

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """All together, in blocks of one size, so that no utterance depends on what it is computed with."""
        hop, window = self.grid.hop, self.grid.window
        # They lie end to end, each from a whole hop on: one view has the frames of all, and those across a
        # border are computed and dropped.
        hops = [-(-len(wav_T) // hop) for wav_T in wavs]
        rows = -(-sum(hops) // self.block) * self.block
        raw_T = torch.zeros(rows * hop + window, device=self.device)
        starts = [0, *accumulate(hops)]
        for wav_T, start in zip(wavs, starts, strict=False):
            raw_T[start * hop : start * hop + len(wav_T)] = wav_T
        with torch.no_grad():
            static_SC = self._static(raw_T, rows)
            found = []
            for wav_T, start in zip(wavs, starts, strict=False):
                own_SC = static_SC[start : start + self.grid.n_frames(len(wav_T))]
                delta_SC = deltas(own_SC) if len(own_SC) else own_SC
                found.append(
                    torch.cat([own_SC, delta_SC, deltas(delta_SC) if len(own_SC) else own_SC], dim=1)
                )
        return found

    def _static(self, raw_T: Tensor, rows: int) -> Tensor:
        """The 13 cepstra of the frame that begins at each hop."""
        window, hop = self.grid.window, self.grid.hop
        static_SC = raw_T.new_empty(rows, _CEPSTRA)
        for start in range(0, rows, self.block):
            block_T = raw_T[start * hop : (start + self.block - 1) * hop + window]
            # Preemphasis is linear, so it runs over the waveform once instead of over every frame: a frame
            # minus its mean, preemphasised, is the preemphasised frame minus (1 - 0.97) times the mean.
            emphasised_T = F.pad(torch.sub(block_T[1:], block_T[:-1], alpha=_PREEMPHASIS), (1, 0))
            mel_SM = self._mel(block_T.unfold(0, window, hop), emphasised_T.unfold(0, window, hop))
            log_SM = mel_SM.clamp_(min=_LOG_FLOOR).log_()
            torch.mm(log_SM, self.cepstra_MC, out=static_SC[start : start + self.block])
        return static_SC

    def _mel(self, raw_SW: Tensor, emphasised_SW: Tensor) -> Tensor:
        rest = 1 - _PREEMPHASIS
        mean_S1 = raw_SW.mean(dim=1, keepdim=True)
        frames_SF = raw_SW.new_zeros(len(raw_SW), _FFT)
        windowed_SW = frames_SF[:, : self.grid.window]
        torch.sub(emphasised_SW, mean_S1, alpha=rest, out=windowed_SW)
        windowed_SW[:, 0] = (
            raw_SW[:, 0] - mean_S1[:, 0]
        ) * rest  # the sample before a frame is its first one
        windowed_SW *= self.window_T
        spectrum_SF = torch.view_as_real(torch.fft.rfft(frames_SF)).flatten(1)
        return spectrum_SF.square_() @ self.mel_FM


def deltas(x_SC: Tensor) -> Tensor:
    """Slope over five frames, the edge frames repeated: torchaudio's `compute_deltas` of window 5."""
    padded = torch.cat([x_SC[:1], x_SC[:1], x_SC, x_SC[-1:], x_SC[-1:]])
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10


def _mel_filters() -> Tensor:
    """(257, 23) triangles, evenly spaced and straight on Kaldi's mel scale 1127 ln(1 + f / 700)."""
    bins_F = torch.arange(_FFT // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE / _FFT)
    mel_F1 = (1127.0 * torch.log1p(bins_F / 700.0))[:, None]
    low, high = (1127.0 * math.log1p(hz / 700.0) for hz in (_LOW_HZ, _HIGH_HZ))
    step = (high - low) / (_MEL_BINS + 1)
    left_M = low + step * torch.arange(_MEL_BINS, dtype=torch.float64)
    weights = torch.minimum(mel_F1 - left_M, left_M + 2 * step - mel_F1).clamp(min=0) / step
    weights[-1] = 0  # Kaldi leaves the Nyquist bin out
    return weights


def _cepstra() -> Tensor:
    """(23, 13): orthonormal DCT-II and lifter in one matrix."""
    order_C = torch.arange(_CEPSTRA, dtype=torch.float64)
    centre_M1 = torch.arange(_MEL_BINS, dtype=torch.float64)[:, None] + 0.5
    dct_MC = torch.cos(math.pi / _MEL_BINS * centre_M1 * order_C) * math.sqrt(2.0 / _MEL_BINS)
    dct_MC[:, 0] = math.sqrt(1.0 / _MEL_BINS)
    return dct_MC * (1 + 0.5 * _LIFTER * torch.sin(math.pi * order_C / _LIFTER))


class HubertLayer:
    """The output of one block of a model, counted from 1, as the next iteration clusters it."""

    name = "hubert"

    def __init__(self, model: HubertModel, layer: int, device: str | torch.device = "cpu"):
        if not 1 <= layer <= model.config.layers:
            raise ConfigError(
                f"layer {layer} was asked for, but the model has blocks 1 to {model.config.layers}"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.layer = layer
        self.dim: int = model.config.width
        self.grid: FrameGrid = model.config.grid

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        features = [torch.zeros(0, self.dim, device=self.device) for _ in wavs]
        # Too short for one frame: no features, as with MFCCs; the model itself would refuse them.
        long = [i for i, wav_T in enumerate(wavs) if self.grid.n_frames(len(wav_T)) > 0]
        if not long:
            return features
        n_samples = [len(wavs[i]) for i in long]
        wav_BT = torch.zeros(len(long), max(n_samples))
        for row, i in enumerate(long):
            wav_BT[row, : n_samples[row]] = wavs[i]
        with torch.no_grad():
            encoded = self.model(wav_BT.to(self.device), torch.tensor(n_samples), last_layer=self.layer)
        for row, i in enumerate(long):
            features[i] = encoded.hidden_BSD[row, : self.grid.n_frames(n_samples[row])].float()
        return features
