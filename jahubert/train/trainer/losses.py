"""Loss functions that return sums; the trainer divides gradients by the global sum of `Loss.count`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def unit_loss(logits_NK: Tensor, unit_N: Tensor) -> Tensor:
    """Compute the cross entropy (nats) summed over masked frames, the masked term of HuBERT's loss (eq. 2).

    Args:
        logits_NK: logits, shape (masked frames, units).
        unit_N: target unit of each masked frame.
    """
    return F.cross_entropy(logits_NK.float(), unit_N, reduction="sum")


def ctc_loss(
    logp_BSV: Tensor, n_frames_B: Tensor, target_L: Tensor, n_target_B: Tensor, blank: int = 0
) -> Tensor:
    """Compute the summed CTC loss (nats), to which utterances that cannot be aligned contribute zero.

    Args:
        logp_BSV: log probabilities, shape (utterances, frames, symbols).
        n_frames_B: number of frames of each utterance.
        target_L: concatenated targets of all utterances.
        n_target_B: number of targets in each utterance.
        blank: index of the blank symbol.
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
