"""Benchmark of pretraining on one CPU thread, for small models that train within minutes on two cores.

    python tools/bench/small_models.py

The script prints the seconds of audio that are processed per second of CPU time, forward and backward.
"""

import time

import torch

from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.trainer.losses import unit_loss

SIZES = {
    "128 everywhere, width 192": ((128,) * 7, 192),
    "tiny (conf/model/tiny.yaml)": ((32, 48, 64, 96, 128, 128, 192), 192),
    "wider, width 256": ((32, 64, 64, 128, 128, 256, 256), 256),
}


def speed(conv_dims: tuple[int, ...], width: int, bf16: bool, seconds: int = 40, rows: int = 8) -> float:
    config = HubertConfig.base(
        conv_dims=conv_dims,
        width=width,
        layers=6,
        heads=4,
        ffn=4 * width,
        pos_conv_kernel=32,
        pos_conv_groups=8,
        layer_drop=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        input_dropout=0.0,
    )
    wav_BT = 0.1 * torch.randn(rows, seconds * 16_000 // rows)
    mask_BS = torch.rand(rows, config.grid.n_frames(wav_BT.shape[1])) < 0.55
    unit_N = torch.randint(100, (int(mask_BS.sum()),))
    model, head = HubertModel(config), UnitHead(width, 100)
    for step in range(5):
        if step == 2:
            started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            encoded = model(wav_BT, mask_BS=mask_BS)
            loss = unit_loss(head(encoded.hidden_BSD[mask_BS]), unit_N) + encoded.conv_penalty_B.mean()
        loss.backward()
    return seconds * 3 / (time.process_time() - started)


def main() -> None:
    torch.set_num_threads(1)
    for name, (conv_dims, width) in SIZES.items():
        fp32, bf16 = speed(conv_dims, width, False), speed(conv_dims, width, True)
        print(f"{name:<30} fp32 {fp32:6.0f}   bf16 {bf16:6.0f}")


if __name__ == "__main__":
    main()
