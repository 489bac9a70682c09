"""Output heads of the encoder: units for pretraining, symbols for recognition (CTC)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model import kernels
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.precision import autocast


class UnitHead(nn.Module):
    """Logits over units: cosine of the projected frame and each unit's embedding, divided by a temperature.

    HuBERT paper section II-C, eq. 3. One matrix product of normalized vectors; equal to fairseq's
    softmax over a positive and all negatives, without its four unused classes.
    """

    def __init__(self, width: int, n_units: int, dim: int = 256, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.final_proj = nn.Linear(width, dim)
        # fairseq draws from [0, 1), where all units point in similar directions; with directions spread over
        # the sphere, training makes progress sooner.
        self.label_embeddings = nn.Parameter(torch.randn(n_units, dim))

    @property
    def n_units(self) -> int:
        """Number of units in the codebook."""
        return self.label_embeddings.shape[0]

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits (N, K), float32, of frames (N, D)."""
        n = len(hidden_ND)
        if kernels.usable(self):  # in few sizes, as oneDNN compiles a kernel for every new one
            hidden_ND = F.pad(hidden_ND, (0, 0, 0, -n % kernels.BLOCK))
        projected_ND = self.final_proj(hidden_ND)
        # In float32: a 16-bit cosine, divided by the temperature, would be wrong by up to 0.02.
        with autocast(torch.float32, hidden_ND.device):
            frames_ND = F.normalize(projected_ND.float(), dim=-1)
            units_KD = F.normalize(self.label_embeddings.float(), dim=-1)
            return (frames_ND @ units_KD.T / self.temperature)[:n]


class HubertForCtc(nn.Module):
    """Encoder and a linear layer over symbols; module names are those of Hugging Face's HubertForCTC."""

    def __init__(self, config: HubertConfig, n_symbols: int, hubert: HubertModel | None = None):
        super().__init__()
        self.hubert = HubertModel(config) if hubert is None else hubert
        self.lm_head = nn.Linear(config.width, n_symbols)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        # Most frames of a trained CTC model are blank. Starting from a blank probability of 0.8, the encoder
        # need not first collapse all frames to produce it, from which a small model recovers slowly.
        nn.init.zeros_(self.lm_head.bias)
        nn.init.constant_(self.lm_head.bias[:1], math.log(0.8 / (0.2 / (n_symbols - 1))))

    @property
    def config(self) -> HubertConfig:
        """Sizes of the encoder."""
        return self.hubert.config

    def forward(
        self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, S, V), float32, and valid frames (B,); arguments as for `HubertModel`."""
        encoded = self.hubert(wav_BT, n_samples_B, **options)
        return self.log_probs(encoded.hidden_BSD), encoded.n_frames_B

    def log_probs(self, hidden_BSD: Tensor) -> Tensor:
        """Log-probabilities (B, S, V), float32, of the encoder's frames (B, S, D)."""
        # In float32: two symbols of nearly the same probability would be equal in 16 bits.
        with autocast(torch.float32, hidden_BSD.device):
            return self.lm_head(hidden_BSD.float()).log_softmax(-1)
