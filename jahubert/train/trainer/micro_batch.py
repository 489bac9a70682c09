"""Size of the micro-batches, derived from GPU memory for training and for `jahubert plan`."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import torch

from jahubert.frames import SAMPLE_RATE
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels.attention import flash_supports
from jahubert.model.kernels.packing import has_flash_attention
from jahubert.train.experiment import distributed
from jahubert.train.trainer.optim import TrainConfig, pick_precision

log = logging.getLogger(__name__)

# Bytes per parameter.
ADAM = 16  # weight, gradient and two moments
DDP_BUCKETS = 4  # gradient copies that DDP reduces over processes
AUTOCAST_COPY = 2  # 16-bit copy of the weights during a micro-batch

# Fraction of GPU memory that tensors may use. The rest is left for CUDA itself, kernels and fragmentation.
_USABLE = 0.85
# Groups are merged up to this size, in seconds of audio. In smaller micro-batches of base, launching kernels
# limits the speed of a GPU: on an H200, a prototype processed 5,214 audio-seconds per second with 330 s per
# micro-batch, and 5,702 with 660 s.
_MERGED_SECONDS = 700.0
# Limits for a CPU, in seconds of audio and in bytes of activations. Larger micro-batches are not faster.
_CPU_SECONDS, _CPU_BYTES = 87.5, 3.4e9
# Factors for the number of values that are stored for the backward pass. A Transformer block stores
# `_PER_WIDTH * width + _PER_FFN * ffn` values per frame. The front end stores the outputs of all convolutions
# times a factor that depends on the normalization. The factors were fitted to the counts of
# `jahubert.train.plan.memory`, which take half a minute to compute.
_PER_WIDTH, _PER_FFN = 4.5, 2
_FRONT_END = {"group": 1.0, "layer": 2.2}


def with_micro_seconds(train: TrainConfig, model: HubertConfig, longest: float) -> TrainConfig:
    """Return `train`, with `micro_seconds` set by `effective_micro_seconds`.

    With several processes, the value is derived from the device of rank 0.

    Args:
        longest: length of the longest utterance in seconds.
    """
    device = distributed.process_device(train.device)

    def properties() -> tuple[float | None, bool]:
        if device.type != "cuda":
            return None, False
        return float(torch.cuda.get_device_properties(device).total_memory), has_flash_attention(device)

    memory_bytes, has_flash = distributed.rank0_broadcast(properties)
    seconds = effective_micro_seconds(
        train,
        model,
        longest=longest,
        memory_bytes=memory_bytes,
        has_flash=has_flash,
        precision=pick_precision(train, device),
        n_devices=distributed.world(),
    )
    if train.micro_seconds is None and distributed.rank() == 0:
        log.info("micro-batches of at most %.4g s of audio", seconds)
    return replace(train, micro_seconds=seconds)


def effective_micro_seconds(
    train: TrainConfig,
    model: HubertConfig,
    *,
    longest: float,
    memory_bytes: float | None,
    has_flash: bool,
    precision: torch.dtype,
    n_devices: int,
) -> float:
    """Return the size of the micro-batches in seconds.

    The limit is `train.micro_seconds` or, if it is null, the largest useful size. If the limit is longer than
    a group of the sampler, the result is that of one group, or of as many groups as the sampler can merge.

    Args:
        longest: length of the longest utterance in seconds.
        memory_bytes: memory of one GPU, or None for a CPU.
        has_flash: whether the GPU has variable-length flash attention.
        precision: autocast dtype of the training.
        n_devices: number of processes.
    """
    limit = train.micro_seconds
    if limit is None:
        limit = max(longest, _useful_seconds(train, model, memory_bytes, has_flash, precision, n_devices))
    sizes = replace(train.batch_sizes, micro_seconds=limit)
    return min(limit, sizes.group_seconds * sizes.groups_per_micro_batch(n_devices))


def _useful_seconds(
    train: TrainConfig,
    model: HubertConfig,
    memory_bytes: float | None,
    has_flash: bool,
    precision: torch.dtype,
    n_devices: int,
) -> float:
    """Return the largest micro-batch size in seconds that fits in memory and may make training faster."""
    per_second = activation_bytes(model, precision, train.recompute)
    group_seconds = train.batch_sizes.group_seconds
    if memory_bytes is None:
        return min(group_seconds, _CPU_SECONDS, _CPU_BYTES / per_second)
    fixed = fixed_bytes(n_parameters(model), precision, n_devices, train.sharded)
    fitting = (_USABLE * memory_bytes - fixed) / per_second
    # Without flash attention, merging would increase the padding for which attention is computed.
    packed = has_flash and flash_supports(precision, model.width // model.heads)
    return min(fitting, max(group_seconds, _MERGED_SECONDS) if packed else group_seconds)


def fixed_bytes(n_parameters: int, precision: torch.dtype, n_devices: int, sharded: bool) -> float:
    """Compute the bytes per device for weights, gradients, moments and copies, for any batch size."""
    total = float(ADAM * n_parameters) / (n_devices if sharded else 1)
    if n_devices > 1 and not sharded:
        total += DDP_BUCKETS * n_parameters
    if precision is not torch.float32:
        total += AUTOCAST_COPY * n_parameters
    return total


def activation_bytes(model: HubertConfig, precision: torch.dtype, recompute: bool) -> float:
    """Estimate the peak memory of activations on a GPU in bytes per second of audio in a micro-batch."""
    rate, values, frames = float(SAMPLE_RATE), 0.0, float(model.grid.rate)
    for width, stride in zip(model.conv_dims, model.conv_strides, strict=True):
        rate /= stride
        values += rate * width
    block = frames * (_PER_WIDTH * model.width + _PER_FFN * model.ffn)
    blocks = model.layers * frames * model.width + block if recompute else model.layers * block
    # The peak is at the start of the backward pass, when no activations have been freed yet. The recomputed
    # GELU output of the last block and the gradient of this output are therefore added.
    stored = _FRONT_END[model.conv_norm] * values + blocks + 2 * frames * model.ffn
    return max(precision.itemsize * stored, front_end_bytes(model, precision))


def front_end_bytes(config: HubertConfig, precision: torch.dtype) -> float:
    """Estimate the peak memory of the backward pass through the convolutions in bytes per second of audio.

    The estimate is only valid for a GPU, which processes all rows at once. A CPU processes a few rows at a
    time.
    """
    rate, n_inputs, peak = float(SAMPLE_RATE), 0.0, 0.0
    for width, stride in zip(config.conv_dims, config.conv_strides, strict=True):
        rate /= stride
        if n_inputs:  # the input, its GELU, and the gradients of input and output
            n_bytes = precision.itemsize * (3 * n_inputs + rate * width)
            if config.conv_norm == "layer":  # the input of the norm, and the gradient of its output
                n_bytes += 2 * precision.itemsize * n_inputs
            peak = max(peak, n_bytes)
        n_inputs = rate * width
    return peak


@cache
def n_parameters(config: HubertConfig) -> int:
    """Return the number of parameters of a model with this configuration."""
    with torch.device("meta"):
        return sum(p.numel() for p in HubertModel(config).parameters())
