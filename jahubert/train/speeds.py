"""How many floating-point operations the model takes, and how many a device does in a second.

The second is measured with a few real steps on this machine (`probe`), or taken from a table of GPUs as a
stated share of their peak (`from_table`), which is an estimate and says so.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace

import numpy as np
import soundfile
import torch

from jahubert.audio import load_audio
from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE
from jahubert.heads import UnitHead
from jahubert.hubert import HubertConfig, HubertModel
from jahubert.precision import computing_in
from jahubert.train import ranks
from jahubert.train.activations import masked_loss
from jahubert.train.config import unknown
from jahubert.train.features import Mfcc
from jahubert.train.optim import TrainConfig, build_optimizer, pick_precision

# Dense products in 16 bits with 32-bit sums, operations a second, and memory: the vendors' data sheets.
GPUS = {
    "V100": (125e12, 32e9),
    "T4": (65e12, 16e9),
    "A10": (125e12, 24e9),
    "A100": (312e12, 80e9),
    "L4": (121e12, 24e9),
    "L40S": (362e12, 48e9),
    "RTX3090": (71e12, 24e9),
    "RTX4090": (165e12, 24e9),
    "H100": (989e12, 80e9),
    "H200": (989e12, 141e9),
    "B200": (2250e12, 180e9),
}
# Of the peak, where nothing was measured. Published runs of HuBERT base come to 0.088 (the paper's, 100,000
# updates in 9.5 h on 32 V100) and 0.085 (minimal_hubert's, 400,000 in 10 h on 16 H100), by `step_flops`.
SHARE = 0.1


@dataclass(frozen=True)
class Machine:
    name: str
    n: int  # devices
    rate: float  # floating-point operations a second of one device, in a training step
    memory: float | None  # bytes of one device; None: not known
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


def probe(config: HubertConfig, train: TrainConfig, n: int) -> Machine:
    """Measure a few real training steps on this machine's own device."""
    device = ranks.pick_device(train.device)
    dtype = pick_precision(train, device)
    budget = train.micro_seconds if device.type == "cuda" else min(16.0, train.micro_seconds)
    seconds = min(8.0, budget)
    model = HubertModel(replace(config, layer_drop=0.0)).to(device)
    head = UnitHead(config.width, 500).to(device)
    optimizer = build_optimizer(torch.nn.ModuleList([model, head]), train)
    wav_BT = torch.randn(max(1, int(budget / seconds)), int(seconds * SAMPLE_RATE), device=device)
    spent = []
    while len(spent) < 2 or (sum(spent) < 5 and len(spent) < 12):
        started = time.perf_counter()
        with computing_in(dtype, device):
            loss = masked_loss(model, head, wav_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - started)
    fastest = min(spent[1:])  # the first one compiles kernels
    speed = wav_BT.numel() / SAMPLE_RATE / fastest
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    source = (
        f"measured here, {str(dtype).removeprefix('torch.')}: {speed:.4g} audio-seconds a second in a step"
    )
    return Machine(name, n, speed * step_flops(config, seconds, False), memory, source, *_reading())


def from_table(gpu: str, n: int, share: float) -> Machine:
    """A GPU that is not here, at a share of its peak.

    Raises:
        ConfigError: the table does not have it.
    """
    names = {name.lower(): name for name in GPUS}
    if gpu.lower() not in names:
        raise ConfigError(unknown("gpu", gpu, GPUS))
    name = names[gpu.lower()]
    peak, memory = GPUS[name]
    source = f"assumed, not measured: {share:.0%} of a peak of {peak / 1e12:.0f} TFLOP/s"
    return Machine(name, n, peak * share, memory, source, *_reading())


def _reading() -> tuple[float, float]:
    """Audio-seconds that one core decodes, and whose MFCCs it computes, in a second."""
    seconds, buffer = 20, io.BytesIO()
    noise_T = np.random.default_rng(0).normal(0, 0.05, seconds * SAMPLE_RATE).astype(np.float32)
    soundfile.write(buffer, noise_T, SAMPLE_RATE, format="FLAC")
    mfcc, rates = Mfcc(), []
    for work in (
        lambda: load_audio(io.BytesIO(buffer.getvalue())),
        lambda: mfcc([torch.from_numpy(noise_T)]),
    ):
        work()
        started = time.perf_counter()
        work()
        rates.append(seconds / (time.perf_counter() - started))
    return rates[0], rates[1]
