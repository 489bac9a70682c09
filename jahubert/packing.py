"""The valid frames of a padded batch laid end to end, so that no layer spends time on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Packing:
    """Valid frames of a padded batch laid end to end, and attention inside each utterance."""

    def __init__(self, n_frames: Sequence[int], width: int, device: torch.device):
        self.n_frames, self.width = list(n_frames), width
        self.full = all(n == width for n in self.n_frames)
        self.mask_BS = (
            torch.arange(width, device=device) < torch.tensor(self.n_frames, device=device)[:, None]
        )
        self.index_N = None if self.full else self.mask_BS.flatten().nonzero()[:, 0]

    def pack(self, x_BSD: Tensor) -> Tensor:
        flat = x_BSD.flatten(0, 1)
        return flat if self.index_N is None else flat.index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        shape = (len(self.n_frames), self.width, *x_ND.shape[1:])
        if self.index_N is None:
            return x_ND.reshape(shape)
        flat = x_ND.new_zeros(shape[0] * shape[1], *x_ND.shape[1:])
        return flat.index_copy(0, self.index_N, x_ND).reshape(shape)

    def attend(self, q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, dropout: float) -> Tensor:
        """Scaled dot-product attention; the three inputs and the result are (N, heads, head width)."""
        if self.full:
            q, k, v = (self.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
            return _attention(q, k, v, dropout).transpose(1, 2).flatten(0, 1)
        if q_NHE.device.type == "cpu":  # one call an utterance computes no padded pair at all
            rows = zip(
                *(x.transpose(0, 1).split(self.n_frames, dim=1) for x in (q_NHE, k_NHE, v_NHE)), strict=True
            )
            outs = [_attention(q, k, v, dropout) for q, k, v in rows]
            return torch.cat(outs, dim=1).transpose(0, 1)
        q, k, v = (self.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
        mask = self.mask_BS[:, None, None, :]
        return self.pack(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention over the last two dimensions, without a mask."""
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        # torch's fused kernel for bfloat16 on a CPU takes 1.5 to 2.5 times as long, forward and backward.
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return F.dropout(weights, dropout) @ v
    if q.dim() == 3:  # the fused kernels want a batch
        return F.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=dropout)[0]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
