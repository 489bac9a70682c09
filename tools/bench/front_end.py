"""Benchmark of the convolutional front end: kernels against plain modules, forward and backward.

    python tools/bench/front_end.py                # one thread, tiny and base, group and layer norms
    python tools/bench/front_end.py --device cuda

The script prints the median milliseconds per second of audio from interleaved runs. The plain modules compute
the whole padded batch, whose amount of padding depends on `--lengths` (seconds).
"""

import argparse
import statistics
import time

import torch
from torch import nn

from jahubert.model import kernels
from jahubert.model.hubert import ConvFrontEnd, HubertConfig
from jahubert.model.kernels.conv_frontend import front_end

SIZES = {"tiny": (32, 48, 64, 96, 128, 128, 192), "base": (512,) * 7}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=float, nargs="+", default=[3.9, 3.8, 3.7, 3.9])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    device, seconds = torch.device(args.device), sum(args.lengths)
    wavs = [0.1 * torch.randn(round(16_000 * length), device=device) for length in args.lengths]
    n_samples, grid = [len(wav_T) for wav_T in wavs], HubertConfig().grid
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    print(f"{'size':>6}{'norm':>8}{'type':>10}{'plain':>9}{'kernels':>9}{'ratio':>8}")
    for size, dims in SIZES.items():
        for norm in ("group", "layer"):
            stack = ConvFrontEnd(HubertConfig(conv_dims=dims, conv_norm=norm)).to(device)
            with kernels.disabled():
                expected = stack(wav_BT, n_samples)
            torch.testing.assert_close(
                front_end(stack, wav_BT, n_samples)[: grid.n_frames(n_samples[0])],
                expected[0, : grid.n_frames(n_samples[0])],
                rtol=1e-3,
                atol=1e-4,
            )
            for dtype in (torch.float32, torch.bfloat16):
                pairs = []
                for _ in range(args.repeats + 2):
                    pair = []
                    for fast in (False, True):
                        started = time.perf_counter()
                        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                            if fast:
                                out = front_end(stack, wav_BT, n_samples)
                            else:
                                with kernels.disabled():
                                    out = stack(wav_BT, n_samples)
                        out.float().square().mean().backward()
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        pair.append(1000 * (time.perf_counter() - started) / seconds)
                    pairs.append(pair)
                plain, kernel = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{size:>6}{norm:>8}{name:>10}{plain:>9.2f}{kernel:>9.2f}{plain / kernel:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
