"""Benchmark of a pretraining step of HuBERT base against transformers and torchaudio (if installed).

    python tools/bench/pretrain_step.py                     # CPU, fp32 and bf16, similar and mixed lengths
    python tools/bench/pretrain_step.py --device cuda --copies 4 --repeats 20
    python tools/bench/pretrain_step.py --blocks 1 --similar 2 2.1 --mixed 2 3 --repeats 2   # a quick check

A step consists of the forward pass, the loss over 500 units with the feature penalty, the backward pass,
clipping and fused AdamW, with the published dropout and layer drop, on the same padded batch and masks.
transformers' HubertModel gets jahubert's unit head on the masked frames, while torchaudio's
hubert_pretrain_base keeps its own masks and head. The steps of the models are interleaved, and the script
prints medians of the times and of the ratios per round. Memory (in addition to weights, gradients and
optimizer state) is measured in a separate process per model. `of peak` is the FLOP/s required for the valid
frames (see `flops`), divided by the FLOP/s of a large matrix product in the same run. Before the measurement,
the loss and the gradient norm are compared with those of transformers for the same weights without dropout.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import importable
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels import PackedShape
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.plan.flops import forward_flops
from jahubert.train.trainer.losses import unit_loss
from jahubert.train.trainer.optim import TrainConfig, build_optimizer

UNITS, PENALTY, CLIP = 500, 10.0, 10.0


@dataclass
class Batch:
    wav_BT: Tensor
    n_samples: list[int]
    mask_BS: Tensor
    unit_BS: Tensor
    masked_index_N: Tensor  # flat indices of the masked frames
    valid_BS: Tensor | None  # mask of the valid frames; None: all frames are valid
    shape: PackedShape | None = None  # shape to which jahubert pads the batch

    @property
    def seconds(self) -> float:
        return sum(self.n_samples) / SAMPLE_RATE


def masked_frames(batch: Batch, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states and units of the masked frames, without synchronizing a GPU."""
    hidden_ND, unit_N = (
        x.flatten(0, 1).index_select(0, batch.masked_index_N) for x in (hidden_BSD, batch.unit_BS)
    )
    return hidden_ND, unit_N


class Jahubert(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        self.hubert, self.head = HubertModel(config), UnitHead(config.width, UNITS)

    def forward(self, batch: Batch) -> Tensor:
        encoded = self.hubert(batch.wav_BT, batch.n_samples, mask_BS=batch.mask_BS, shape=batch.shape)
        hidden_ND, unit_N = masked_frames(batch, encoded.hidden_BSD)
        loss = unit_loss(self.head(hidden_ND), unit_N) / len(unit_N)
        n_frames_B = encoded.n_frames_B
        return loss + PENALTY * (encoded.conv_penalty_B * n_frames_B).sum() / n_frames_B.sum()


class Transformers(nn.Module):
    """transformers' HubertModel, called module by module because the loss needs the convolution outputs."""

    def __init__(self, config: HubertConfig):
        super().__init__()
        from transformers import HubertConfig as Config
        from transformers import HubertModel as Model

        self.hubert = Model(
            Config(
                num_hidden_layers=config.layers,
                hidden_size=config.width,
                num_attention_heads=config.heads,
                intermediate_size=config.ffn,
                feat_extract_norm=config.conv_norm,
                conv_bias=config.conv_bias,
                do_stable_layer_norm=config.pre_norm,
                layerdrop=config.layer_drop,
                hidden_dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                feat_proj_dropout=config.input_dropout,
            )
        )
        self.head, self.scale = UnitHead(config.width, UNITS), config.conv_grad_scale

    def forward(self, batch: Batch) -> Tensor:
        conv_BCS = self.hubert.feature_extractor(batch.wav_BT.clone())
        conv_BCS = self.scale * conv_BCS + (1 - self.scale) * conv_BCS.detach()
        penalty = conv_BCS.float().pow(2).mean()  # fairseq scales this gradient too
        hidden_BSD = self.hubert.feature_projection(conv_BCS.transpose(1, 2))
        hidden_BSD = self.hubert._mask_hidden_states(hidden_BSD, mask_time_indices=batch.mask_BS)
        hidden_BSD = self.hubert.encoder(hidden_BSD, attention_mask=batch.valid_BS)[0]
        hidden_ND, unit_N = masked_frames(batch, hidden_BSD)
        return unit_loss(self.head(hidden_ND), unit_N) / len(unit_N) + PENALTY * penalty


class Torchaudio(nn.Module):
    def __init__(self, config: HubertConfig):
        super().__init__()
        from torchaudio.models import hubert_pretrain_base, hubert_pretrain_large

        # The large model always has 500 classes.
        self.model = hubert_pretrain_large() if config.pre_norm else hubert_pretrain_base(num_classes=UNITS)
        transformer = self.model.wav2vec2.encoder.transformer
        transformer.layers = transformer.layers[: config.layers]

    def forward(self, batch: Batch) -> Tensor:
        lengths = torch.tensor(batch.n_samples, device=batch.wav_BT.device)
        logits_NK, _, penalty = self.model(batch.wav_BT, batch.unit_BS, lengths)
        # Column 0 contains the logit of the target unit.
        target_N = torch.zeros(len(logits_NK), dtype=torch.long, device=logits_NK.device)
        return F.cross_entropy(logits_NK.float(), target_N) + PENALTY * penalty


KINDS = {"jahubert": Jahubert, "transformers": Transformers, "torchaudio": Torchaudio}


def make_batch(lengths: list[float], device: torch.device) -> Batch:
    n_samples = [round(SAMPLE_RATE * seconds) for seconds in sorted(lengths, reverse=True)]
    rng, grid = seeded_rng(0), HubertConfig().grid
    wavs = [torch.from_numpy(0.1 * rng.standard_normal(n)).float() for n in n_samples]
    masks = [torch.from_numpy(span_mask(grid.n_frames(n), 0.8, 10, rng, 2)) for n in n_samples]
    mask_BS = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    unit_BS = torch.from_numpy(rng.integers(0, UNITS, mask_BS.shape))
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    masked_index_N = mask_BS.flatten().nonzero()[:, 0]
    valid_BS = nn.utils.rnn.pad_sequence([torch.ones(len(mask), dtype=torch.bool) for mask in masks], True)
    return Batch(
        wav_BT.to(device),
        n_samples,
        *(x.to(device) for x in (mask_BS, unit_BS, masked_index_N)),
        None if valid_BS.all() else valid_BS.to(device),
    )


def flops(config: HubertConfig, n_samples: list[int]) -> float:
    """Compute the FLOPs that a step requires for the valid frames.

    These are the matrix products and convolutions of the encoder: the forward pass, and twice as many in the
    backward pass. Layer drop counts with its expected value, and the positional convolution as a direct
    convolution. Recomputation, the loss and the optimizer are not counted.
    """
    total = 0.0
    for n in n_samples:
        front_end, blocks = forward_flops(config, n / SAMPLE_RATE)
        total += n / SAMPLE_RATE * (front_end + (1 - config.layer_drop) * blocks)
    return 3 * total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product, taking the best of several runs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


class Trainer:
    """A model with its optimizer, and the training step."""

    def __init__(self, kind: str, config: HubertConfig, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.config, self.device, self.dtype = config, device, dtype
        with device:  # random initialization of a large model takes seconds on a CPU
            self.module = KINDS[kind](config).to(device).train()
        self.optimizer = build_optimizer(self.module, TrainConfig(lr=1e-5))

    def step(self, batch: Batch, keep_gradients: bool = False) -> float:
        """Run a step and return its duration in seconds. Gradients are released unless `keep_gradients`."""
        synchronize(self.device)
        started = time.perf_counter()
        self._step(batch, keep_gradients)
        synchronize(self.device)
        return time.perf_counter() - started

    def mean_step(self, batch: Batch, n_steps: int) -> float:
        """Run steps without waiting for the device in between, and return their mean duration in seconds."""
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(n_steps):
            self._step(batch)
        synchronize(self.device)
        return (time.perf_counter() - started) / n_steps

    def _step(self, batch: Batch, keep_gradients: bool = False) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.module(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)


def check(config: HubertConfig) -> None:
    """Compare the loss and gradient norm with those of transformers on one utterance, without dropout."""
    names = ("dropout", "attention_dropout", "input_dropout", "layer_drop")
    config = HubertConfig.base(layers=config.layers, **dict.fromkeys(names, 0.0))
    batch, results = make_batch([2.0], torch.device("cpu")), []
    torch.manual_seed(0)
    model, reference = Jahubert(config).train(), Transformers(config).train()
    reference.load_state_dict(model.state_dict())
    for module in (model, reference):
        loss = module(batch)
        loss.backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        results.append(torch.stack([loss.detach(), torch.nn.utils.get_total_norm(gradients)]))
    difference = float(((results[0] - results[1]) / results[1]).abs().max())
    print(f"largest relative difference from transformers in loss and gradient norm: {difference:.1e}")
    if difference > 1e-3:
        raise SystemExit("parity check failed")


def memory(kind: str, lengths: list[float], precision: str, args) -> float:
    """Measure the peak memory of the activations in a step (MB), in a separate process."""
    worker = ["--worker", kind, precision, *map(str, lengths)]
    command = [sys.executable, __file__, "--device", args.device, "--blocks", str(args.blocks)]
    done = subprocess.run([*command, "--threads", str(args.threads), *worker], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(kind: str, precision: str, lengths: list[float], config: HubertConfig, device: torch.device) -> None:
    """Print the peak memory of two steps above the memory in use between steps (on a CPU: only on Linux)."""
    trainer, batch = Trainer(kind, config, device, DTYPES[precision]), make_batch(lengths, device)
    trainer.step(batch, keep_gradients=True)  # creates gradients and moments, which are not to be measured
    if device.type == "cuda":
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system
        base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak counter
    for _ in range(2):
        trainer.step(batch, keep_gradients=True)
    highest = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    print((highest - base) / 2**20)


PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
PRODUCTS |= {"aten::mkldnn_convolution", "aten::convolution_backward"}


def products(trainer: Trainer, batch: Batch) -> tuple[float, float]:
    """Return the time of a step, and the CPU time of its matrix products and convolutions, in seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = trainer.step(batch)
    return seconds, sum(e.self_cpu_time_total for e in profile.key_averages() if e.key in PRODUCTS) / 1e6


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare(name: str, lengths: list[float], precision: str, config: HubertConfig, args) -> None:
    device, dtype = torch.device(args.device), DTYPES[precision]
    batch, peak = make_batch(lengths, device), matrix_peak(device, dtype)
    kinds = [kind for kind in KINDS if kind == "jahubert" or importable(kind)]
    trainers = {kind: Trainer(kind, config, device, dtype) for kind in kinds}
    rows = [[trainer.step(batch) for trainer in trainers.values()] for _ in range(args.repeats + 2)][2:]
    if args.profile:
        for kind, trainer in trainers.items():
            print("{:>28}: step {:.2f} s, matrix products {:.2f} s".format(kind, *products(trainer, batch)))
    del trainers
    if device.type == "cuda":
        torch.cuda.empty_cache()  # free GPU memory for the processes that measure memory
    for column, kind in enumerate(kinds):
        seconds = statistics.median(row[column] for row in rows)
        ratio = statistics.median(row[column] / row[0] for row in rows)
        share = flops(config, batch.n_samples) / seconds / peak
        print(
            f"{name:>8}{precision:>6}{kind:>14}{batch.seconds / seconds:>14.2f}{ratio:>16.2f}"
            f"{memory(kind, lengths, precision, args):>10.0f}{share:>9.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--similar",
        type=float,
        nargs="*",
        default=[4.4, 4.4, 4.3, 4.3],
        help="lengths of the utterances in seconds; empty to skip",
    )
    parser.add_argument("--mixed", type=float, nargs="*", default=[2.0, 3.0, 5.0, 8.0, 15.0])
    parser.add_argument("--copies", type=int, default=1, help="copies of each length, to fill a GPU")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=12, help="Transformer blocks; fewer for quick checks")
    parser.add_argument("--profile", action="store_true", help="print the time of matrix products (CPU)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision for all models
    config = HubertConfig.base(layers=args.blocks)
    if args.worker:
        kind, precision, *lengths = args.worker
        return work(kind, precision, [float(length) for length in lengths], config, torch.device(args.device))
    if importable("transformers"):
        check(config)
    print(f"{'lengths':>8}{'type':>6}{'':>14}{'audio-s/s':>14}{'relative time':>16}{'MB':>10}{'of peak':>9}")
    for name, lengths in (("similar", args.similar), ("mixed", args.mixed)):
        for precision in args.precision if lengths else ():
            compare(name, lengths * args.copies, precision, config, args)


if __name__ == "__main__":
    main()
