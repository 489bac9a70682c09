"""The valid frames of a padded batch laid end to end, so that no layer spends time on padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.frontend import BLOCK, up_to

SPAN = 32  # frames; attention and positional convolution work on multiples of it (see frontend.BLOCK)


class _Span(NamedTuple):
    """Utterances of about one length, as a rectangle of packed rows."""

    index_P: Tensor  # the packed row of each place of the rectangle
    shape: tuple[int, int]  # utterances, frames
    bias_B11S: Tensor  # minus infinity where a place lies behind its utterance


class Packing:
    """Valid frames of a padded batch laid end to end, and attention inside each utterance.

    Packed tensors (N, D) hold the valid frames first and up to `BLOCK` - 1 rows of no meaning behind
    them, on which no result depends.
    """

    def __init__(self, n_frames: Sequence[int], width: int, device: torch.device):
        self.n_frames, self.width, self.device = list(n_frames), width, device
        self.n_valid = sum(n_frames)
        index = [row * width + i for row, n in enumerate(self.n_frames) for i in range(n)]
        spare = up_to(self.n_valid, BLOCK) - self.n_valid
        self.index_N = torch.tensor(index + [index[0]] * spare, device=device)

    def pack(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """A padded batch, zero behind each utterance."""
        flat = x_ND.new_zeros(len(self.n_frames) * self.width, *x_ND.shape[1:])
        flat = flat.index_copy(0, self.index_N[: self.n_valid], x_ND[: self.n_valid])
        return flat.unflatten(0, (-1, self.width))

    def attend(self, q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, dropout: float) -> Tensor:
        """Scaled dot-product attention; the three inputs and the result are (N, heads, head width)."""
        if q_NHE.device.type != "cpu":
            q, k, v = (self.unpack(x).transpose(1, 2) for x in (q_NHE, k_NHE, v_NHE))
            mask = None if min(self.n_frames) == self.width else self._mask_BS[:, None, None, :]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            return self.pack(out.transpose(1, 2))
        if q_NHE.dtype is torch.bfloat16:
            return self._attend_bfloat16(q_NHE, k_NHE, v_NHE, dropout)
        # One call an utterance computes no padded pair at all.
        parts = [*self.n_frames, len(q_NHE) - self.n_valid]
        rows = zip(*(x.transpose(0, 1)[None].split(parts, dim=2) for x in (q_NHE, k_NHE, v_NHE)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) for q, k, v in rows]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    def _attend_bfloat16(self, q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, dropout: float) -> Tensor:
        """On a CPU in bfloat16, plain operations in few sizes take a fifth of the fused kernel's time."""
        spans, back_N = self._spans
        scale, outs = q_NHE.shape[-1] ** -0.5, []
        for span in spans:
            q, k, v = (
                x.index_select(0, span.index_P).unflatten(0, span.shape).transpose(1, 2)
                for x in (q_NHE, k_NHE, v_NHE)
            )
            weights = torch.softmax((q * scale) @ k.transpose(-1, -2) + span.bias_B11S.to(q.dtype), dim=-1)
            outs.append((F.dropout(weights, dropout) @ v).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, back_N)

    @cached_property
    def _mask_BS(self) -> Tensor:
        n_frames_B = torch.tensor(self.n_frames, device=self.device)
        return torch.arange(self.width, device=self.device) < n_frames_B[:, None]

    @cached_property
    def _spans(self) -> tuple[list[_Span], Tensor]:
        """The rectangles, and where each packed row lies in them, laid end to end."""
        starts = list(accumulate(self.n_frames, initial=0))
        order = sorted(range(len(self.n_frames)), key=lambda row: self.n_frames[row])
        spans, place, back = [], 0, [0] * len(self.index_N)
        for frames, members in groupby(order, key=lambda row: up_to(self.n_frames[row], SPAN)):
            rows = list(members)
            index = torch.zeros(len(rows), frames, dtype=torch.int64)
            bias = torch.zeros(len(rows), 1, 1, frames)
            for i, row in enumerate(rows):
                start, n = starts[row], self.n_frames[row]
                index[i, :n] = torch.arange(start, start + n)
                bias[i, ..., n:] = float("-inf")
                back[start : start + n] = range(place, place + n)
                place += frames
            spans.append(_Span(index.flatten(), (len(rows), frames), bias))
        return spans, torch.tensor(back)
