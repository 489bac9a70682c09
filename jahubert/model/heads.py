"""Output heads for the encoder: unit prediction for pretraining, and CTC for recognition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model import kernels
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.precision import at_least_float32, autocast


class UnitHead(nn.Module):
    """Head that predicts units by the cosine similarity of the projected frame and each unit's embedding.

    The head computes the logits of the softmax in eq. 3 of the HuBERT paper as one matrix product of
    normalized vectors, divided by a temperature. They equal fairseq's logits for one positive and all
    negatives, without its four unused classes.
    """

    def __init__(self, width: int, n_units: int, dim: int = 256, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.final_proj = nn.Linear(width, dim)
        # fairseq draws embeddings from [0, 1), so all of them point in similar directions. The loss decreases
        # sooner if the embeddings are spread over the sphere.
        self.label_embeddings = nn.Parameter(torch.randn(n_units, dim))

    @property
    def n_units(self) -> int:
        """Number of units in the codebook."""
        return self.label_embeddings.shape[0]

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits (N, K) for frames (N, D), in float32 or higher precision."""
        n = len(hidden_ND)
        if kernels.usable(self):  # sizes are rounded up, because oneDNN compiles a kernel for every new size
            hidden_ND = F.pad(hidden_ND, (0, 0, 0, -n % kernels.BLOCK))
        projected_ND = self.final_proj(hidden_ND)
        # Float32 is used, because a 16-bit cosine divided by the temperature would have errors of up to 0.02.
        with autocast(torch.float32, hidden_ND.device):
            frames_ND = F.normalize(at_least_float32(projected_ND), dim=-1)
            units_KD = F.normalize(at_least_float32(self.label_embeddings), dim=-1)
            return (frames_ND @ units_KD.T / self.temperature)[:n]


class HubertForCtc(nn.Module):
    """Encoder with a linear layer over symbols. Module names are those of Hugging Face's HubertForCTC."""

    def __init__(self, config: HubertConfig, n_symbols: int, hubert: HubertModel | None = None):
        super().__init__()
        self.hubert = HubertModel(config) if hubert is None else hubert
        self.lm_head = nn.Linear(config.width, n_symbols)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        # A trained CTC model predicts blank for most frames. If the head did not favor blank initially, the
        # encoder would first map all frames to one vector, and small models recover from that slowly.
        nn.init.zeros_(self.lm_head.bias)
        nn.init.constant_(self.lm_head.bias[:1], math.log(0.8 / (0.2 / (n_symbols - 1))))

    @property
    def config(self) -> HubertConfig:
        """Configuration of the encoder."""
        return self.hubert.config

    def forward(
        self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (B, S, V) and valid frame counts (B,).

        The arguments are those of `HubertModel.forward`.
        """
        encoded = self.hubert(wav_BT, n_samples_B, **options)
        return self.log_probs(encoded.hidden_BSD), encoded.n_frames_B

    def log_probs(self, hidden_BSD: Tensor) -> Tensor:
        """Return log-probabilities (B, S, V) for encoder frames (B, S, D), in float32 or higher precision."""
        # Float32 is used, because nearly equal probabilities would become equal in 16 bits.
        with autocast(torch.float32, hidden_BSD.device):
            log_probs_BSV: Tensor = self.lm_head(at_least_float32(hidden_BSD)).log_softmax(-1)
            return log_probs_BSV
