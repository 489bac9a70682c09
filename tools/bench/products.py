"""Benchmark of float32 matrix products on a CPU: oneDNN, used by the kernels on AMD, against torch's default.

    python tools/bench/products.py                 # GFLOPS on one thread, interleaved
    python tools/bench/products.py --threads 2 --repeats 30

The products are those of a linear layer of HuBERT base, of its gradients with respect to the input and the
weight, and of a convolutional layer. The results of both libraries must agree.
"""

import argparse
import statistics
import time

import torch

from jahubert.model.kernels import products

FRAMES, WIDTH, INNER = 1024, 768, 3072  # packed frames (20 s of audio), model width, feed-forward width
# Rows, inner dimension and columns of each product.
SHAPES = {
    "layer": (FRAMES, WIDTH, INNER),
    "input gradient": (FRAMES, INNER, WIDTH),
    "weight gradient": (INNER, FRAMES, WIDTH),
    "convolution": (4 * FRAMES, 1024, 512),
}


def seconds(a: torch.Tensor, b: torch.Tensor, onednn: bool) -> float:
    started = time.perf_counter()
    products.matmul(a, b) if onednn else a @ b
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    products.onednn_is_faster = lambda: True
    print(f"{'product':>16}{'default':>10}{'oneDNN':>10}{'ratio':>8}{'difference':>12}")
    for name, (n, k, m) in SHAPES.items():
        a, b = torch.randn(n, k), torch.randn(m, k).T
        pairs = [(seconds(a, b, False), seconds(a, b, True)) for _ in range(args.repeats + 2)][2:]
        default, onednn = (
            2e-9 * n * k * m / statistics.median(column) for column in zip(*pairs, strict=True)
        )
        ratio = statistics.median(first / second for first, second in pairs)
        difference = float((products.matmul(a, b) - a @ b).abs().max() / (a @ b).abs().max())
        print(f"{name:>16}{default:>10.0f}{onednn:>10.0f}{ratio:>8.2f}{difference:>12.1e}")
        if difference > 1e-5:
            raise SystemExit("parity check failed")


if __name__ == "__main__":
    main()
