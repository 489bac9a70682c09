"""The convolutional front end, forward and backward, against plain torch.nn layers on the same weights.

    python tools/bench/front_end.py                # one thread, tiny and base, group and layer norms
    python tools/bench/front_end.py --device cuda

Milliseconds for a second of audio, both in turn in one run, medians. The plain stack computes the padded
rectangle, as its peers do; `--lengths` in seconds decides how much of it is padding.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model.kernels.conv_frontend import ConvFrontEnd

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
SIZES = {"tiny": (32, 48, 64, 96, 128, 128, 192), "base": (512,) * 7}


def plain(stack: ConvFrontEnd, wav_BT: Tensor) -> Tensor:
    """The padded batch through torch's own layers: (B, frames, channels)."""
    x_BCS = wav_BT[:, None]
    for layer in stack.conv_layers:
        x_BCS = layer.conv(x_BCS)
        if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
            x_BCS = layer.layer_norm(x_BCS)
        elif layer.norm == "layer":
            x_BCS = layer.layer_norm(x_BCS.transpose(1, 2)).transpose(1, 2)
        x_BCS = F.gelu(x_BCS)
    return x_BCS.transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=float, nargs="+", default=[3.9, 3.8, 3.7, 3.9])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for the peers too
    torch.manual_seed(0)
    device, seconds = torch.device(args.device), sum(args.lengths)
    wavs = [0.1 * torch.randn(round(16_000 * length), device=device) for length in args.lengths]
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    print(f"{'size':>6}{'norm':>8}{'type':>10}{'plain':>9}{'ours':>9}{'ratio':>8}")
    for size, dims in SIZES.items():
        for norm in ("group", "layer"):
            stack = ConvFrontEnd(dims, KERNELS, STRIDES, bias=False, norm=norm).to(device)
            one = plain(stack, wavs[0][None])[0]
            torch.testing.assert_close(stack(wavs[:1])[: len(one)], one, rtol=1e-3, atol=1e-4)
            for dtype in (torch.float32, torch.bfloat16):
                pairs = []
                for _ in range(args.repeats + 2):
                    pair = []
                    for encode, batch in ((lambda x, s=stack: plain(s, x), wav_BT), (stack, wavs)):
                        started = time.perf_counter()
                        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                            out = encode(batch)
                        out.float().square().mean().backward()
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        pair.append(1000 * (time.perf_counter() - started) / seconds)
                    pairs.append(pair)
                theirs, ours = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{size:>6}{norm:>8}{name:>10}{theirs:>9.2f}{ours:>9.2f}{theirs / ours:>8.2f}", flush=True
                )


if __name__ == "__main__":
    main()
