"""The two losses, as pure functions: sums over what was predicted, to be divided by a global count."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def unit_loss(logits_NK: Tensor, unit_N: Tensor) -> Tensor:
    """Sum of the cross entropy (nats) over masked frames (HuBERT paper eq. 2, only the masked part)."""
    return F.cross_entropy(logits_NK.float(), unit_N, reduction="sum")


def ctc_loss(
    logp_BSV: Tensor, n_frames_B: Tensor, target_L: Tensor, n_target_B: Tensor, blank: int = 0
) -> Tensor:
    """Sum of the CTC loss (nats) over utterances; one that cannot be aligned counts zero.

    `target_L` holds all targets of the batch end to end.
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
