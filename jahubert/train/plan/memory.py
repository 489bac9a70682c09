"""What a training step keeps for its backward pass, counted on tensors without numbers.

On a GPU it keeps more than the same model on a CPU: layer norms (its autocast) and the positional
convolution are computed in float32, and attention holds padded rectangles. A torch without CUDA has no
tensors of a GPU, so the first two are done while counting and the last is added; together they are within
1 % of what fake CUDA tensors gave (torch 2.15, fused attention; figures in `tests/train/plan/test_plan.py`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels.positional_conv import PositionalConv
from jahubert.model.packing import Packing
from jahubert.model.precision import autocast
from jahubert.train.trainer.parallel import wrap_blocks

MASKED = 0.57  # of the frames, at the paper's mask settings
_ROWS = 4  # utterances; what twice as many keep more does not hold what does not grow, as copies of weights
# Of a frame's width, in each block: what attention keeps on a GPU and not on a CPU. In 16 bits its result,
# as a rectangle beside the packed one.
_PADDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 1}


def masked_loss(model: HubertModel, head: UnitHead, wav_BT: Tensor) -> Tensor:
    """A loss of masked prediction's sizes."""
    hidden_ND = model(wav_BT).hidden_BSD.flatten(0, 1)
    return head(hidden_ND[: round(len(hidden_ND) * MASKED)]).float().logsumexp(-1).sum()


@cache
def kept_bytes(
    config: HubertConfig, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> float:
    """What a forward pass over utterances of `seconds` keeps for the backward pass, bytes an audio-second."""
    if gpu:  # its fused attention keeps no dropout mask
        config = replace(config, attention_dropout=0.0)
    once, twice = (_kept(config, rows, seconds, recompute, precision, gpu) for rows in (_ROWS, 2 * _ROWS))
    kept = (twice - once) / (_ROWS * seconds)
    if gpu and not recompute:
        frames = config.grid.n_frames(int(seconds * SAMPLE_RATE)) / seconds
        kept += _PADDED[precision] * precision.itemsize * config.layers * config.width * frames
    return kept


def peak_bytes(
    config: HubertConfig, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> float:
    """What tensors of a micro-batch take at most, forward and backward, bytes an audio-second."""
    kept = kept_bytes(config, seconds, recompute, precision, gpu)
    frames = config.grid.n_frames(int(seconds * SAMPLE_RATE)) / seconds
    block = 2 * precision.itemsize * config.ffn * frames  # GELU in the last block, and its gradient
    if recompute:  # which is there as a whole then
        block += (kept_bytes(config, seconds, False, precision, gpu) - kept) / config.layers
    return max(kept + block, front_end_bytes(config, precision) if gpu else 0.0)


def front_end_bytes(config: HubertConfig, precision: torch.dtype) -> float:
    """What backward through a convolution has at once at most, when all above it is done: bytes an
    audio-second. On a GPU, which takes all rows at once; a CPU takes a part of them at a time."""
    rate, below, most = float(SAMPLE_RATE), 0.0, 0.0
    for width, stride in zip(config.conv_dims, config.conv_strides, strict=True):
        rate /= stride
        if below:  # its input, GELU of that, the gradient to it; and the gradient that comes
            now = precision.itemsize * (3 * below + rate * width)
            if config.conv_norm == "layer":  # the input is kept too, and what the norm got, in float32
                now += (precision.itemsize + 4) * below
            most = max(most, now)
        below = rate * width
    return most


class _NormsOfGpus(TorchFunctionMode):
    """Layer norms in float32, as autocast has them on CUDA and not on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.layer_norm:
            return function(*args, **(kwargs or {}))
        with autocast(torch.float32, torch.device("cpu")):
            return function(args[0].float(), *args[1:], **(kwargs or {}))


def _as_on_gpus(convolution: PositionalConv) -> None:
    """By frequencies in float32: in 16 bits a CPU takes the plain sum, a GPU does not."""
    own = convolution.forward

    def in_float32(x_ND: Tensor, packing: Packing) -> Tensor:
        with autocast(torch.float32, torch.device("cpu")):
            return own(x_ND.float(), packing).to(x_ND.dtype)

    convolution.forward = in_float32  # type: ignore[method-assign]


def _kept(
    config: HubertConfig, rows: int, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Any] = {}  # storages by identity, held so that none is given out twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    norms = _NormsOfGpus() if gpu else nullcontext()
    with FakeTensorMode(), norms, autocast(precision, torch.device("cpu")):
        model, head = HubertModel(replace(config, layer_drop=0.0)), UnitHead(config.width, 500)
        model.encoder.training = False  # or it would look at a random number for layer drop
        if gpu:
            _as_on_gpus(model.encoder.pos_conv_embed)
        wrap_blocks(list(model.encoder.layers), recompute, False)
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *head.parameters())}
        with hooks:
            loss = masked_loss(model, head, torch.zeros(rows, int(seconds * SAMPLE_RATE)))
        del loss
        return sum(storage.nbytes() for place, storage in kept.items() if place not in own)
