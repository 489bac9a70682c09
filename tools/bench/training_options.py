"""Benchmark of training steps with activation checkpointing and torch.compile: time and memory.

    python tools/bench/training_options.py --model base --seconds 24 --repeats 5

A step consists of the forward pass, a loss over 500 units, the backward pass and AdamW. The steps of the
variants are interleaved on the same batches. "stored" is the memory, per second of audio, that the forward
pass keeps for the backward pass, as `jahubert plan` computes it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.experiment.config import structure
from jahubert.train.pipeline.compose import compose
from jahubert.train.plan.memory import kept_bytes
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, pick_precision
from jahubert.train.trainer.parallel import wrap_blocks

VARIANTS = {"plain": (False, False), "recompute": (True, False), "compile": (False, True)}


class Step:
    def __init__(self, config: HubertConfig, train: TrainConfig, recompute: bool, compiled: bool):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = pick_precision(train, self.device)
        self.model = HubertModel(replace(config, layer_drop=0.0)).to(self.device).train()
        self.head = UnitHead(config.width, 500).to(self.device)
        wrap_blocks(list(self.model.encoder.layers), recompute, compiled)
        modules = torch.nn.ModuleList([self.model, self.head])
        self.optimizer = build_optimizer(modules, train)

    def __call__(self, wav_BT: torch.Tensor, lengths: list[int]) -> float:
        started = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            hidden_ND = self.model(wav_BT, lengths).hidden_BSD.flatten(0, 1)
            loss = self.head(hidden_ND[: len(hidden_ND) // 2]).float().logsumexp(-1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seconds", type=float, default=16.0, help="seconds of audio per batch")
    parser.add_argument("--lengths", type=int, default=4, help="number of different batches")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    config = structure(compose(["recipe=reazonspeech", f"model={args.model}"])["model"], HubertConfig)
    train = TrainConfig(precision=args.precision)
    steps = {name: Step(config, train, *variant) for name, variant in VARIANTS.items()}
    device = next(iter(steps.values())).device
    batches = []
    for number in range(args.lengths):  # lengths vary, as in training
        seconds = 3.0 + 0.37 * number
        n = max(1, int(args.seconds / seconds))
        lengths = [int(16_000 * (seconds - 0.05 * row)) for row in range(n)]
        batches.append((torch.randn(n, max(lengths), device=device), lengths))
    audio = sum(sum(lengths) for _, lengths in batches) / 16_000
    first: dict[str, float] = {}
    for name, step in steps.items():
        started = time.perf_counter()
        for batch in batches:
            step(*batch)
        first[name] = time.perf_counter() - started
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            spent[name].append(sum(step(*batch) for batch in batches))
    dtype = steps["plain"].dtype
    threads = torch.get_num_threads()
    print(f"{args.model}, {dtype}, {device}, {threads} threads, {audio:.0f} s in {args.lengths} batches")
    for name, times in spent.items():
        stored = kept_bytes(config, 8.0, name == "recompute", dtype, device.type == "cuda")
        median = statistics.median(times)
        ratio = median / statistics.median(spent["plain"])
        print(
            f"{name:10} {audio / median:8.2f} audio-seconds per second  {ratio:.2f} of plain's time  "
            f"first round {first[name]:.1f} s  stored {stored / 1e6:.1f} MB per audio-second"
        )


if __name__ == "__main__":
    main()
