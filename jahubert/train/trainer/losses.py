"""Loss functions: sums over targets, to be divided by their global count."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def unit_loss(logits_NK: Tensor, unit_N: Tensor) -> Tensor:
    """Summed cross entropy (nats) over masked frames (HuBERT paper, eq. 2, masked part only)."""
    return F.cross_entropy(logits_NK.float(), unit_N, reduction="sum")


def ctc_loss(
    logp_BSV: Tensor, n_frames_B: Tensor, target_L: Tensor, n_target_B: Tensor, blank: int = 0
) -> Tensor:
    """Summed CTC loss (nats) over utterances; an utterance that cannot be aligned counts as zero.

    `target_L` is the concatenation of the targets of all utterances.
    """
    return F.ctc_loss(
        logp_BSV.float().transpose(0, 1),
        target_L,
        n_frames_B,
        n_target_B,
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )
