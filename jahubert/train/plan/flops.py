"""How many floating-point operations the model takes, and how many a device does in a second.

The second is measured with a few real steps on this machine (`probe`), or taken from a table of GPUs as a
stated share of their peak (`from_table`), which is an estimate and says so.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from jahubert.audio import load_audio
from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.precision import autocast, preferred_dtype
from jahubert.train.clustering.features import Mfcc
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import unknown_name_error
from jahubert.train.plan.memory import masked_loss
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, pick_precision


class Gpu(NamedTuple):
    bits16: float  # dense products in 16 bits with 32-bit sums, operations a second
    float32: float  # the same in float32, without tensor cores: torch uses no TF32 unless told to
    memory: float  # bytes
    bfloat16: bool = True  # in hardware


# The vendors' data sheets.
GPUS = {
    "V100": Gpu(125e12, 15.7e12, 32e9, bfloat16=False),
    "T4": Gpu(65e12, 8.1e12, 16e9, bfloat16=False),
    "A10": Gpu(125e12, 31.2e12, 24e9),
    "A100": Gpu(312e12, 19.5e12, 80e9),
    "L4": Gpu(121e12, 30.3e12, 24e9),
    "L40S": Gpu(362e12, 91.6e12, 48e9),
    "RTX3090": Gpu(71e12, 35.6e12, 24e9),
    "RTX4090": Gpu(165e12, 82.6e12, 24e9),
    "H100": Gpu(989e12, 67e12, 80e9),
    "H200": Gpu(989e12, 67e12, 141e9),
    "B200": Gpu(2250e12, 75e12, 180e9),
}
# Of the peak in 16 bits, where nothing was measured. Published runs of HuBERT base come to 0.088 (the
# paper's, 100,000 updates in 9.5 h on 32 V100) and 0.085 (minimal_hubert's, 400,000 in 10 h on 16 H100), by
# `step_flops`.
SHARE = 0.1
# Of the peak in float32, which is lower, so that less stands beside the products: on a CPU three times the
# share in 16 bits (docs/performance.md, 60 % and 20 %).
SHARE_FLOAT32 = 0.3


@dataclass(frozen=True)
class Machine:
    name: str
    n: int  # devices
    rate: float  # floating-point operations a second of one device, in a training step in 16 bits
    float32: float  # the same in float32
    bfloat16: bool  # what precision=auto takes: this, or float32
    memory: float | None  # bytes of one GPU; None: a CPU
    source: str  # "measured" and on what, or "assumed" and what
    decoding: float  # audio-seconds that one core decodes in a second, measured here
    mfcc: float  # audio-seconds whose MFCCs one core computes in a second, measured here


def forward_flops(config: HubertConfig, seconds: float, layer: int | None = None) -> tuple[float, float]:
    """Operations an audio-second of a forward pass: below the blocks, and of the blocks up to `layer`.

    Two for each weight that a frame meets, and the two products of attention in utterances of `seconds`.
    """
    length, channels, below = int(seconds * SAMPLE_RATE), 1, 0.0
    for width, kernel, stride in zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True):
        length = (length - kernel) // stride + 1
        below += 2.0 * length * width * channels * kernel
        channels = width
    width = config.width
    positions = width * width // config.pos_conv_groups * config.pos_conv_kernel
    below += 2.0 * length * (channels * width + positions)
    blocks = config.layers if layer is None else min(layer, config.layers)
    each = 2.0 * length * (4 * width * width + 2 * width * config.ffn + 2 * length * width)
    return below / seconds, blocks * each / seconds


def step_flops(config: HubertConfig, seconds: float, recompute: bool) -> float:
    """Operations an audio-second of a training step: backward is twice forward."""
    below, blocks = forward_flops(config, seconds)
    return 3 * below + (4 if recompute else 3) * blocks


def n_parameters(config: HubertConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in HubertModel(config).parameters())


def probe(config: HubertConfig, trains: Sequence[TrainConfig], n: int) -> Machine:
    """Measure a few real training steps on this machine's own device, in each precision that is needed."""
    device = distributed.process_device(trains[0].device)
    asked = [pick_precision(train, device) for train in trains]
    # Features and labels are computed in float32, whatever a training takes.
    dtypes = dict.fromkeys([*(dtype for dtype in asked if dtype.itemsize == 2), torch.float32])
    speeds = {dtype: _speed(config, trains[0], device, dtype) for dtype in dtypes}
    rates = [speed * step_flops(config, _seconds(trains[0]), False) for speed in speeds.values()]
    gpu = device.type == "cuda"
    said = (f"{_named(dtype)}: {speed:.4g}" for dtype, speed in speeds.items())
    return Machine(
        torch.cuda.get_device_name(device) if gpu else "this machine's CPU",
        n,
        rates[0],
        rates[-1],
        preferred_dtype(device) is torch.bfloat16,
        torch.cuda.get_device_properties(device).total_memory if gpu else None,
        f"measured here, {', '.join(said)} audio-seconds a second in a step",
        *_reading(),
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(train: TrainConfig) -> float:
    """Of an utterance that is measured."""
    return min(8.0, train.micro_seconds)


def _speed(config: HubertConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Audio-seconds a second of training steps."""
    budget = train.micro_seconds if device.type == "cuda" else min(16.0, train.micro_seconds)
    seconds = _seconds(train)
    model = HubertModel(replace(config, layer_drop=0.0)).to(device)
    head = UnitHead(config.width, 500).to(device)
    optimizer = build_optimizer(torch.nn.ModuleList([model, head]), train)
    wav_BT = torch.randn(max(1, int(budget / seconds)), int(seconds * SAMPLE_RATE), device=device)
    spent = []
    while len(spent) < 2 or (sum(spent) < 5 and len(spent) < 12):
        started = time.perf_counter()
        with autocast(dtype, device):
            loss = masked_loss(model, head, wav_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - started)
    return wav_BT.numel() / SAMPLE_RATE / min(spent[1:])  # the first one compiles kernels


def from_table(gpu: str, n: int, share: float) -> Machine:
    """A GPU that is not here, at a share of its peak.

    Raises:
        ConfigError: the table does not have it.
    """
    names = {name.lower(): name for name in GPUS}
    if gpu.lower() not in names:
        raise ConfigError(unknown_name_error("gpu", gpu, GPUS))
    name = names[gpu.lower()]
    found = GPUS[name]
    rate = share * found.bits16
    source = (
        f"assumed, not measured: {share:.3g} of a peak of {found.bits16 / 1e12:.0f} TFLOP/s in 16 bits, "
        f"{SHARE_FLOAT32:g} of {found.float32 / 1e12:.3g} in float32, but no more than in 16 bits"
    )
    return Machine(
        name,
        n,
        rate,
        min(rate, SHARE_FLOAT32 * found.float32),
        found.bfloat16,
        found.memory,
        source,
        *_reading(),
    )


def _reading() -> tuple[float, float]:
    """Audio-seconds that one core decodes, and whose MFCCs it computes, in a second: medians."""
    seconds, repeats, buffer = 5, 15, io.BytesIO()
    noise_T = np.random.default_rng(0).normal(0, 0.05, seconds * SAMPLE_RATE).astype(np.float32)
    soundfile.write(buffer, noise_T, SAMPLE_RATE, format="FLAC")
    mfcc, spent = Mfcc(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for work in (
            lambda: load_audio(io.BytesIO(buffer.getvalue())),
            lambda: mfcc([torch.from_numpy(noise_T)]),
        ):
            work()
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
            spent.append(median(times))
    finally:
        torch.set_num_threads(threads)
    return seconds / spent[0], seconds / spent[1]
