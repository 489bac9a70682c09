"""Benchmark of the positional convolution of HuBERT base on a CPU: direct and in the frequency domain.

    python tools/bench/positional_conv.py          # CPU time in milliseconds on one thread, interleaved

For bfloat16, the relative errors of the outputs with respect to float32 are printed as well.

The result explains which of the two `jahubert/model/kernels/positional_conv.py` uses on a CPU.
"""

import statistics
import time

import torch
from torch import Tensor

from jahubert.model.hubert import HubertConfig, PositionalConv
from jahubert.model.kernels import positional_conv
from jahubert.model.kernels.packing import Packing

# Frames of each utterance: similar lengths, mixed lengths, a single utterance, and short utterances.
BATCHES = {
    "similar": (215,) * 4,
    "mixed": (99, 149, 249, 399, 749),
    "single": (1500,),
    "short": (49,) * 20,
}
FUNCTIONS = positional_conv._direct, positional_conv.frequency_domain_conv


def milliseconds(function, module: PositionalConv, x_ND: Tensor, packing: Packing, training: bool) -> float:
    started = time.process_time()
    with torch.set_grad_enabled(training), torch.autocast("cpu", enabled=x_ND.dtype is torch.bfloat16):
        y_ND = function(module, x_ND.requires_grad_(training), packing)
    if training:
        y_ND.float().square().sum().backward()
    return 1000 * (time.process_time() - started)


def error(function, module: PositionalConv, x_ND: Tensor, packing: Packing) -> float:
    """Return the relative error of `function` in bfloat16."""
    with torch.no_grad():
        exact_ND = positional_conv.frequency_domain_conv(module, x_ND.float(), packing)
        with torch.autocast("cpu"):
            y_ND = function(module, x_ND, packing)
        return float((y_ND.float() - exact_ND).norm() / exact_ND.norm())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = HubertConfig.base()
    module = PositionalConv(config)
    print(f"{'batch':>8}{'type':>10}{'':>10}{'direct':>9}{'frequency':>11}{'ratio':>8}")
    for name, n_frames in BATCHES.items():
        packing = Packing(n_frames, max(n_frames), torch.device("cpu"))
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True):
                x_ND = torch.randn(packing.n_rows, config.width, dtype=dtype)
                pairs = [
                    [milliseconds(f, module, x_ND.clone(), packing, training) for f in FUNCTIONS]
                    for _ in range(7)
                ]
                direct, frequency = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
                case = f"{name:>8}{str(dtype)[6:]:>10}{'training' if training else 'inference':>10}"
                print(f"{case}{direct:>9.1f}{frequency:>11.1f}{direct / frequency:>8.2f}")
        errors = [
            error(function, module, torch.randn(packing.n_rows, config.width).bfloat16(), packing)
            for function in FUNCTIONS
        ]
        print(f"{name:>8}{'bfloat16':>10}{'error':>10}{errors[0]:>9.2%}{errors[1]:>11.2%}")


if __name__ == "__main__":
    main()
