"""Models as ONNX files: one recording of any length in, log-probabilities or the frames of all layers out.

The model's own forward pass packs batches and reads their lengths, which no graph can hold. `Plain` is the
same arithmetic on one utterance, with the same weights, in operations that every runtime has.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.errors import MissingExtraError
from jahubert.formats.bundle import Bundle
from jahubert.frames import SAMPLE_RATE
from jahubert.model.hubert import Encoder, EncoderLayer, HubertModel
from jahubert.model.kernels.conv_frontend import ConvLayer

INPUT = "wav"  # float32 (1, samples), 16 kHz, full scale 1
OUTPUTS = {True: "log_probs", False: "layers"}  # of a CTC model (1, frames, symbols); else (layers + 1, ...)
CHECKED = (1.0, 0.31, 4.0)  # seconds on which a written file is compared


class Plain(nn.Module):
    """One utterance through a model: `(1, T)` -> log-probabilities `(1, S, V)`, or layers `(L + 1, S, D)`.

    Row 0 of the layers is the input of block 1, the last one the encoder's output behind its closing norm.
    """

    def __init__(self, hubert: HubertModel, lm_head: nn.Linear | None = None):
        super().__init__()
        self.hubert, self.lm_head = hubert, lm_head
        normed = (
            hubert.encoder.pos_conv_embed.conv
        )  # its weight norm need not be computed for every recording
        sizes = (normed.in_channels, normed.out_channels, normed.kernel_size[0])
        self.pos_conv = nn.Conv1d(*sizes, padding=normed.padding[0], groups=normed.groups)
        self.pos_conv.load_state_dict({"weight": normed.weight.detach(), "bias": normed.bias.detach()})

    def forward(self, wav: Tensor) -> Tensor:
        config = self.hubert.config
        if config.normalize:
            spread = torch.sqrt(wav.var(unbiased=False) + config.normalize_eps)
            wav = (wav - wav.mean()) / spread
        x_1CN = wav[:, None]
        for layer in self.hubert.feature_extractor.conv_layers:
            x_1CN = _conv(cast(ConvLayer, layer), x_1CN)
        x_1SD = self.hubert.feature_projection(x_1CN.transpose(1, 2))
        layers = _encode(self.hubert.encoder, x_1SD + self._positions(x_1SD))
        if self.lm_head is not None:
            return self.lm_head(layers[-1]).log_softmax(-1)
        return torch.cat(layers)

    def _positions(self, x_1SD: Tensor) -> Tensor:
        y_1DS = self.pos_conv(x_1SD.transpose(1, 2))
        return F.gelu(y_1DS[:, :, : y_1DS.shape[2] - self.hubert.encoder.pos_conv_embed.extra]).transpose(
            1, 2
        )


def _conv(layer: ConvLayer, x_1CN: Tensor) -> Tensor:
    x_1CN = layer.conv(x_1CN)
    if layer.norm == "group":
        x_1CN = layer.layer_norm(x_1CN)
    elif layer.norm == "layer":
        x_1CN = layer.layer_norm(x_1CN.transpose(1, 2)).transpose(1, 2)
    return F.gelu(x_1CN)


def _encode(encoder: Encoder, x_1SD: Tensor) -> list[Tensor]:
    if not encoder.pre_norm:
        x_1SD = encoder.layer_norm(x_1SD)
    layers = [x_1SD]
    for module in encoder.layers:
        layer = cast(EncoderLayer, module)
        if layer.pre_norm:
            x_1SD = x_1SD + _attend(layer, layer.layer_norm(x_1SD))
            x_1SD = x_1SD + layer.feed_forward(layer.final_layer_norm(x_1SD))
        else:
            x_1SD = layer.layer_norm(x_1SD + _attend(layer, x_1SD))
            x_1SD = layer.final_layer_norm(x_1SD + layer.feed_forward(x_1SD))
        layers.append(x_1SD)
    if encoder.pre_norm:
        layers[-1] = encoder.layer_norm(x_1SD)
    return layers


def _attend(layer: EncoderLayer, x_1SD: Tensor) -> Tensor:
    own = layer.attention
    q, k, v = (
        project(x_1SD).unflatten(2, (own.heads, -1)).transpose(1, 2)
        for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    return own.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def write_onnx(path: Path, bundle: Bundle) -> float:
    """Write the model of a bundle; returns how much onnxruntime's answers to random audio differ at most.

    Symbols, sample rate and what the output is stand in the file's metadata. MissingExtraError without the
    packages of the extra `onnx`.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx") from error
    grid, head = bundle.config.grid, None if bundle.ctc is None else bundle.ctc.lm_head
    plain = Plain(bundle.model, head).eval()
    name = OUTPUTS[head is not None]
    samples = torch.export.Dim("samples", min=grid.n_samples(2))
    loggers = [logging.getLogger(each) for each in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                plain, (torch.zeros(1, SAMPLE_RATE),), dynamo=True, input_names=[INPUT], output_names=[name],
                dynamic_shapes={"wav": {1: samples}}, verbose=False,
            )  # fmt: skip
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    model = program.model_proto
    about = {"sample_rate": SAMPLE_RATE, "hop": grid.hop, "window": grid.window, "output": name}
    if bundle.phonemes is not None:
        about |= {"symbols": list(bundle.phonemes.symbols), "blank": bundle.phonemes.blank}
    for key, value in about.items():
        model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.save(model, os.fspath(path))
    return difference(path, bundle)


def difference(path: Path, bundle: Bundle) -> float:
    """The largest absolute difference between the file in onnxruntime and the bundle, on random audio."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for seconds in CHECKED:
        wav_1T = torch.randn(1, round(seconds * SAMPLE_RATE), generator=generator)
        (found,) = session.run(None, {INPUT: wav_1T.numpy()})
        worst = max(worst, float(np.abs(found - expected(bundle, wav_1T).numpy()).max()))
    return worst


def expected(bundle: Bundle, wav_1T: Tensor) -> Tensor:
    """What the file shall answer, by the bundle's own forward pass."""
    with torch.inference_mode():
        if bundle.ctc is not None:
            return bundle.ctc(wav_1T)[0]
        top = bundle.config.layers
        encoded = bundle.model(wav_1T, keep_layers=range(top + 1))
        return torch.cat([*(encoded.layers[number] for number in range(top)), encoded.hidden_BSD])
