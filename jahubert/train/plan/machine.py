"""Speed and memory of the target machine, measured locally or taken from a table of GPUs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

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
from jahubert.train.plan.flops import forward_flops, step_flops
from jahubert.train.plan.memory import masked_loss
from jahubert.train.trainer.micro_batch import with_micro_seconds
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, pick_precision


class Gpu(NamedTuple):
    """Peak figures from the vendor's data sheet."""

    flops_16bit: float  # dense FLOP/s with 16-bit inputs and 32-bit accumulation
    flops_fp32: float  # FLOP/s without tensor cores, because torch does not use TF32 by default
    memory_bytes: float
    has_bfloat16: bool = True


GPUS = {
    "V100": Gpu(125e12, 15.7e12, 32e9, has_bfloat16=False),
    "T4": Gpu(65e12, 8.1e12, 16e9, has_bfloat16=False),
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


class TrainingRate(NamedTuple):
    """Measured rate of training HuBERT base in bfloat16 (docs/performance.md and LOG.md)."""

    micro_seconds: float  # size of the micro-batches in seconds of audio
    speed: float  # seconds of audio per second
    mean_seconds: float  # mean length of the utterances, weighted by length


class MeasuredRates(NamedTuple):
    """Rates of one GPU with HuBERT base."""

    training: tuple[TrainingRate, ...]  # by increasing size of the micro-batches
    features: dict[str, float]  # extraction of layer-6 features by precision, in seconds of audio per second


_MIXED_SECONDS, _SIMILAR_SECONDS = 9.9, 4.4  # mean lengths in the batches of the benchmark
MEASURED = {
    "H200": MeasuredRates(
        (
            TrainingRate(87.0, 2_121.0, _SIMILAR_SECONDS),
            TrainingRate(174.0, 3_506.0, _SIMILAR_SECONDS),
            TrainingRate(330.0, 5_439.0, _MIXED_SECONDS),
            TrainingRate(660.0, 5_702.0, _MIXED_SECONDS),
        ),
        features={"fp32": 3_482.0, "bf16": 5_313.0},
    )
}
# Assumed utilization (fraction of the 16-bit peak) of a GPU that was not measured. An H200 reaches 0.24 with
# micro-batches of 330 s according to `step_flops`. GPUs older than Ampere lack variable-length flash
# attention. For them, 0.1 is assumed, because published runs of HuBERT base without it reach 0.088 (HuBERT
# paper: 100,000 updates in 9.5 h on 32 V100) and 0.085 (minimal_hubert: 400,000 updates in 10 h on 16 H100).
UTILIZATION, UTILIZATION_WITHOUT_FLASH = 0.2, 0.1
# Assumed fraction of the float32 peak. It is higher than in 16 bits, because matrix products take longer
# compared with the overhead. An H200 reaches 0.5 in feature extraction.
UTILIZATION_FP32 = 0.3


@dataclass(frozen=True)
class Machine:
    """Properties of the machine for which costs are estimated. FLOP rates are per device."""

    name: str
    n_devices: int
    flops_16bit: float  # achieved FLOP/s in 16 bits
    flops_fp32: float  # achieved FLOP/s in float32
    has_bfloat16: bool  # whether precision=auto selects bfloat16 rather than float32
    memory_bytes: float | None  # memory of one GPU, or None for a CPU
    source: str  # description of the measurement or assumption
    decode_speed: float  # seconds of audio that one core decodes per second, measured on this machine
    mfcc_speed: float  # seconds of audio whose MFCCs one core computes per second, measured on this machine
    measured_model: HubertConfig | None = None  # the model whose training was measured
    # Measured sizes of micro-batches (seconds of audio, increasing) with the FLOP/s of training in 16 bits;
    # empty: `flops_16bit` for all sizes
    measured_sizes: tuple[tuple[float, float], ...] = ()
    # Achieved FLOP/s of feature extraction in 16 bits; None: `flops_16bit`
    features_16bit: float | None = None

    @property
    def computes_bfloat16(self) -> bool:
        """Whether the 16-bit rates hold for bfloat16. CPUs may have it without preferring it."""
        return self.has_bfloat16 or self.memory_bytes is None

    def training_flops(self, micro_seconds: float) -> float:
        """Return the FLOP/s of training in 16 bits with micro-batches of this size.

        Between measured sizes, the time per micro-batch is interpolated. Below the smallest one, the time is
        assumed to be constant, because launching kernels takes longer than computing. Above the largest one,
        the FLOP/s are assumed to be constant.
        """
        if not self.measured_sizes:
            return self.flops_16bit
        sizes = [size for size, _ in self.measured_sizes]
        times = [size / flops for size, flops in self.measured_sizes]
        seconds = min(micro_seconds, sizes[-1])
        return seconds / float(np.interp(seconds, sizes, times))

    def rate_basis(self, micro_seconds: float) -> str:
        """Return how the rate of training the measured model with micro-batches of this size is known."""
        if not self.measured_sizes:
            return "measured"
        sizes = [size for size, _ in self.measured_sizes]
        if any(abs(micro_seconds - size) <= 0.02 * size for size in sizes):
            return "measured"
        return "interpolated" if sizes[0] < micro_seconds < sizes[-1] else "extrapolated"


def measure(config: HubertConfig, trains: Sequence[TrainConfig], n_devices: int) -> Machine:
    """Measure the speed of training in float32 and the run's 16-bit dtypes, of decoding, and of MFCCs."""
    device = distributed.process_device(trains[0].device)
    requested = [pick_precision(train, device) for train in trains]
    # By default, features and labels are computed in float32.
    dtypes = list(dict.fromkeys([*(dtype for dtype in requested if dtype.itemsize == 2), torch.float32]))
    speeds = [_training_speed(config, trains[0], device, dtype) for dtype in dtypes]
    flops = [speed * step_flops(config, _utterance_seconds(trains[0]), False) for speed in speeds]
    is_gpu = device.type == "cuda"
    measured = ", ".join(
        f"{speed:.4g} in {str(dtype).removeprefix('torch.')}"
        for dtype, speed in zip(dtypes, speeds, strict=True)
    )
    decode_speed, mfcc_speed = _reading_speeds()
    return Machine(
        name=torch.cuda.get_device_name(device) if is_gpu else "this machine's CPU",
        n_devices=n_devices,
        flops_16bit=flops[0],
        flops_fp32=flops[-1],
        has_bfloat16=preferred_dtype(device) is torch.bfloat16,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_gpu else None,
        source=f"measured on this machine, in seconds of audio per second of training: {measured}",
        measured_model=config,
        decode_speed=decode_speed,
        mfcc_speed=mfcc_speed,
    )


def from_table(gpu: str, n_devices: int, utilization: float | None) -> Machine:
    """Look up a GPU by name, ignoring case. Its rates are either measured or a fraction of its peak.

    Args:
        utilization: assumed fraction of the 16-bit peak. With None, measured rates are used if available, and
            otherwise the default fraction.

    Raises:
        ConfigError: the GPU is not in the table.
    """
    names = {name.lower(): name for name in GPUS}
    if gpu.lower() not in names:
        raise ConfigError(unknown_name_error("gpu", gpu, GPUS))
    name = names[gpu.lower()]
    peak, rates = GPUS[name], None if utilization else MEASURED.get(name)
    training: tuple[tuple[float, float], ...] = ()
    features_16bit: float | None = None
    if rates:
        base = HubertConfig.base()
        training = tuple(
            (rate.micro_seconds, rate.speed * step_flops(base, rate.mean_seconds, False))
            for rate in rates.training
        )
        flops_16bit = max(flops for _, flops in training)
        features = sum(forward_flops(base, _MIXED_SECONDS, layer=6))
        flops_fp32, features_16bit = (rates.features[name] * features for name in ("fp32", "bf16"))
        speeds = " / ".join(f"{rate.speed:,.0f}" for rate in rates.training)
        sizes = " / ".join(f"{rate.micro_seconds:g}" for rate in rates.training)
        source = (
            f"measured on one {name} with HuBERT base: {speeds} s of audio per second of training in "
            f"bfloat16 with micro-batches of {sizes} s, and {rates.features['fp32']:,.0f} / "
            f"{rates.features['bf16']:,.0f} of layer-6 features in float32 / bfloat16"
        )
    else:
        utilization = utilization or (UTILIZATION if peak.has_bfloat16 else UTILIZATION_WITHOUT_FLASH)
        flops_16bit = utilization * peak.flops_16bit
        flops_fp32 = min(flops_16bit, UTILIZATION_FP32 * peak.flops_fp32)
        source = (
            f"assumed, not measured: {utilization:.3g} of the 16-bit peak of "
            f"{peak.flops_16bit / 1e12:.0f} TFLOP/s; in float32 {UTILIZATION_FP32:g} of "
            f"{peak.flops_fp32 / 1e12:.3g} TFLOP/s, but at most the 16-bit rate"
        )
    decode_speed, mfcc_speed = _reading_speeds()
    return Machine(
        name=name,
        n_devices=n_devices,
        flops_16bit=flops_16bit,
        flops_fp32=flops_fp32,
        has_bfloat16=peak.has_bfloat16,
        memory_bytes=peak.memory_bytes,
        source=source,
        measured_model=HubertConfig.base() if rates else None,
        measured_sizes=training,
        features_16bit=features_16bit,
        decode_speed=decode_speed,
        mfcc_speed=mfcc_speed,
    )


def _utterance_seconds(train: TrainConfig) -> float:
    sizes = train.batch_sizes
    return min(8.0, sizes.group_seconds, sizes.micro_seconds or sizes.group_seconds)


def _training_speed(
    config: HubertConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype
) -> float:
    """Measure the training speed in seconds of audio per second of computation."""
    seconds = _utterance_seconds(train)
    budget = with_micro_seconds(train, config, seconds).micro_seconds or seconds
    if device.type == "cpu":
        budget = min(16.0, budget)
    model = HubertModel(replace(config, layer_drop=0.0)).to(device)
    head = UnitHead(config.width, 500).to(device)
    optimizer = build_optimizer(torch.nn.ModuleList([model, head]), train)
    wav_BT = torch.randn(max(1, int(budget / seconds)), int(seconds * SAMPLE_RATE), device=device)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < 5 and len(times) < 12):
        started = time.perf_counter()
        with autocast(dtype, device):
            loss = masked_loss(model, head, wav_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return wav_BT.numel() / SAMPLE_RATE / min(times[1:])  # the first step compiles kernels


def _reading_speeds() -> tuple[float, float]:
    """Measure how many seconds of audio per second one core can decode, and can convert to MFCCs."""
    seconds, flac = 5, io.BytesIO()
    noise_T = np.random.default_rng(0).normal(0, 0.05, seconds * SAMPLE_RATE).astype(np.float32)
    soundfile.write(flac, noise_T, SAMPLE_RATE, format="FLAC")
    mfcc, wav_T = Mfcc(), torch.from_numpy(noise_T)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decode_time = _median_time(lambda: load_audio(io.BytesIO(flac.getvalue())))
        mfcc_time = _median_time(lambda: mfcc([wav_T]))
    finally:
        torch.set_num_threads(threads)
    return seconds / decode_time, seconds / mfcc_time


def _median_time(work: Callable[[], Any], repeats: int = 15) -> float:
    work()  # the first call is a warm-up
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)
