"""Activation memory of a training step, counted with fake tensors.

A GPU stores more for the backward pass than a CPU: the positional convolution always computes in the
frequency domain, and attention in 16 bits stores padded tensors. Without CUDA, torch cannot create fake CUDA
tensors. The first effect is therefore reproduced on the CPU, and the second is added. In float32, the result
is within 1 % of the count on fake CUDA tensors (torch 2.15, fused attention; tests/train/plan/test_plan.py).
In 16 bits, it is an upper bound, because variable-length flash attention stores no padded tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels.packing import Packing
from jahubert.model.kernels.positional_conv import frequency_domain_conv, positional_conv
from jahubert.model.precision import autocast
from jahubert.train.trainer.micro_batch import front_end_bytes
from jahubert.train.trainer.parallel import wrap_blocks

MASKED = 0.57  # fraction of masked frames with the mask settings of the HuBERT paper
_ROWS = 4  # number of utterances; the difference between counts for _ROWS and 2 * _ROWS has no constant terms
# Number of additional values that attention stores per frame and layer on a GPU, as a multiple of the width.
# In 16 bits, attention stores its output both packed and as a padded tensor.
_PADDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 1}


def masked_loss(model: HubertModel, head: UnitHead, wav_BT: Tensor) -> Tensor:
    """Compute a loss whose tensors have the same sizes as in masked prediction."""
    hidden_ND = model(wav_BT).hidden_BSD.flatten(0, 1)
    logits_NK: Tensor = head(hidden_ND[: round(len(hidden_ND) * MASKED)])
    return logits_NK.float().logsumexp(-1).sum()


@cache
def kept_bytes(
    config: HubertConfig, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> float:
    """Count the bytes stored for the backward pass, per second of audio in utterances of length `seconds`."""
    if gpu:  # fused attention does not store a dropout mask
        config = replace(config, attention_dropout=0.0)
    once, twice = (_stored(config, rows, seconds, recompute, precision, gpu) for rows in (_ROWS, 2 * _ROWS))
    kept = (twice - once) / (_ROWS * seconds)
    if gpu and not recompute:
        frames = config.grid.n_frames(int(seconds * SAMPLE_RATE)) / seconds
        kept += _PADDED[precision] * precision.itemsize * config.layers * config.width * frames
    return kept


def peak_bytes(
    config: HubertConfig, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> float:
    """Estimate the peak memory of the tensors in a micro-batch, in bytes per second of audio."""
    kept = kept_bytes(config, seconds, recompute, precision, gpu)
    frames = config.grid.n_frames(int(seconds * SAMPLE_RATE)) / seconds
    block = 2 * precision.itemsize * config.ffn * frames  # GELU output of the last block, and its gradient
    if recompute:  # add the activations of one complete layer
        block += (kept_bytes(config, seconds, False, precision, gpu) - kept) / config.layers
    return max(kept + block, front_end_bytes(config, precision) if gpu else 0.0)


def _stored(
    config: HubertConfig, rows: int, seconds: float, recompute: bool, precision: torch.dtype, gpu: bool
) -> int:
    """Count the bytes that a forward pass over `rows` utterances stores, excluding weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    n_samples = int(seconds * SAMPLE_RATE)
    with FakeTensorMode(), autocast(precision, torch.device("cpu")):
        model, head = HubertModel(replace(config, layer_drop=0.0)), UnitHead(config.width, 500)
        # Fake tensors have no values, but layer drop would need the value of a random number.
        model.encoder.training = False
        wrap_blocks(list(model.encoder.layers), recompute, False)
        weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *head.parameters())}
        total = _stored_by(lambda: masked_loss(model, head, torch.zeros(rows, n_samples)), weights)
        if gpu:  # replaces the CPU's positional convolution with the GPU's
            n_frames = config.grid.n_frames(n_samples)
            packing = Packing([n_frames] * rows, n_frames, torch.device("cpu"))
            x_ND = torch.zeros(packing.n_rows, config.width, dtype=precision, requires_grad=True)
            conv = model.encoder.pos_conv_embed
            total -= _stored_by(lambda: positional_conv(conv, x_ND, packing), weights)
            total += _stored_by(lambda: frequency_domain_conv(conv, x_ND, packing), weights)
        return total


def _stored_by(forward: Callable[[], Tensor], weights: set[int]) -> int:
    """Count the bytes that a function saves for its backward pass, each storage once, except `weights`."""
    stored: dict[int, Any] = {}  # address -> storage; the references prevent reuse of an address

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for address, storage in stored.items() if address not in weights)
