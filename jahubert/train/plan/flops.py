"""Numbers of floating-point operations in a forward pass and in a training step."""

from __future__ import annotations

from jahubert.frames import SAMPLE_RATE
from jahubert.model.hubert import HubertConfig


def forward_flops(config: HubertConfig, seconds: float, layer: int | None = None) -> tuple[float, float]:
    """Compute the FLOPs of a forward pass per second of audio.

    The result counts two operations per weight and frame, and the two matrix products of attention.

    Args:
        seconds: length of the utterances, which determines the cost of attention.
        layer: the last layer to compute; None means all layers.

    Returns:
        The FLOPs of the front end (convolutions, projection, positional convolution) and of the layers.
    """
    length, channels, front_end = round(seconds * SAMPLE_RATE), 1, 0.0
    for width, kernel, stride in zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True):
        length = (length - kernel) // stride + 1
        front_end += 2.0 * length * width * channels * kernel
        channels = width
    width = config.width
    pos_conv = width * width // config.pos_conv_groups * config.pos_conv_kernel
    front_end += 2.0 * length * (channels * width + pos_conv)
    blocks = config.layers if layer is None else min(layer, config.layers)
    per_block = 2.0 * length * (4 * width * width + 2 * width * config.ffn + 2 * length * width)
    return front_end / seconds, blocks * per_block / seconds


def step_flops(config: HubertConfig, seconds: float, recompute: bool) -> float:
    """Compute the FLOPs of a training step per second of audio. A backward pass costs two forward passes."""
    front_end, blocks = forward_flops(config, seconds)
    return 3 * front_end + (4 if recompute else 3) * blocks
