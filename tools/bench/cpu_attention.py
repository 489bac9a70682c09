"""Benchmark of attention on a CPU: torch's fused kernel against unfused operations, forward and backward.

    python tools/bench/cpu_attention.py            # times in milliseconds on one thread, interleaved

The result explains why `jahubert/model/kernels/attention.py` uses unfused operations in bfloat16 and the
fused kernel in float32. With dropout, which the fused kernel does not support, the operations are always
unfused.
"""

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def milliseconds(attend, inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    attend(*inputs).sum().backward()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'heads x width':>14}{'frames':>8}{'type':>10}{'fused':>9}{'unfused':>9}{'ratio':>8}")
    for heads, width in ((4, 48), (12, 64)):
        for frames in (100, 300, 600):
            for dtype in (torch.float32, torch.bfloat16):
                inputs = [
                    torch.randn(1, heads, frames, width, dtype=dtype, requires_grad=True) for _ in range(3)
                ]
                pairs = []
                for _ in range(12):
                    pairs.append([milliseconds(f, inputs) for f in (F.scaled_dot_product_attention, unfused)])
                fused, plain = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{heads:>9} x {width:<3}{frames:>7}{name:>10}"
                    f"{fused:>9.2f}{plain:>9.2f}{fused / plain:>8.2f}"
                )


if __name__ == "__main__":
    main()
