"""ONNX export of a graph that maps a recording to log-probabilities or to the outputs of all layers."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from jahubert.errors import MissingExtraError
from jahubert.formats.bundle import Bundle
from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import HubertForCtc

INPUT = "wav"  # name of the input, float32 (1, samples) at 16 kHz with a full scale of 1
OUTPUTS = {True: "log_probs", False: "layers"}  # name of the output with and without a CTC head
CHECKED = (1.0, 0.31, 4.0)  # lengths in seconds of the random recordings for checking a written file


class OnnxGraph(nn.Module):
    """Wrapper that maps one recording (1, T) to the single output of the ONNX graph.

    The output is log-probabilities (1, S, V) for a CTC model, otherwise layers (L + 1, S, D): the input of
    block 1, the outputs of blocks 1 to L - 1, and the output of the encoder.
    """

    def __init__(self, bundle: Bundle):
        super().__init__()
        self.model = copy.deepcopy(bundle.model if bundle.ctc is None else bundle.ctc).eval()
        hubert = self.model.hubert if isinstance(self.model, HubertForCtc) else self.model
        # The weight norm is folded, because it would otherwise be computed for every recording.
        positional = hubert.encoder.pos_conv_embed
        positional.conv = cast(Any, positional.conv.folded())

    def forward(self, wav: Tensor) -> Tensor:
        if isinstance(self.model, HubertForCtc):
            log_probs: Tensor = self.model(wav)[0]
            return log_probs
        blocks = self.model.config.layers
        encoded = self.model(wav, keep_layers=range(blocks))
        return torch.cat([*encoded.layers.values(), encoded.hidden_BSD])


def write_onnx(path: Path, bundle: Bundle) -> float:
    """Write the model of a bundle, and return the `difference` between file and bundle.

    The metadata of the file contains the sample rate, the hop and window lengths, the name of the output and,
    if the bundle has CTC symbols, the symbols and the index of the blank.

    Raises:
        MissingExtraError: a package of the extra `onnx` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx requires it
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx") from error
    grid, name = bundle.config.grid, OUTPUTS[bundle.ctc is not None]
    graph = OnnxGraph(bundle).eval()
    samples = torch.export.Dim("samples", min=grid.n_samples(2))
    loggers = [logging.getLogger(each) for each in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                graph, (torch.zeros(1, SAMPLE_RATE),), dynamo=True, input_names=[INPUT], output_names=[name],
                dynamic_shapes={"wav": {1: samples}}, verbose=False,
            )  # fmt: skip
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    model = program.model_proto
    # The exporter records how each node was traced, including the paths of source files on this machine.
    graph_parts = (model.graph.node, model.graph.value_info, model.graph.input, model.graph.output)
    for part in (model.graph, *itertools.chain(*graph_parts)):
        del part.metadata_props[:]
    metadata = {"sample_rate": SAMPLE_RATE, "hop": grid.hop, "window": grid.window, "output": name}
    if bundle.phonemes is not None:
        metadata |= {"symbols": list(bundle.phonemes.symbols), "blank": bundle.phonemes.blank}
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.save(model, os.fspath(path))
    return difference(path, bundle)


def import_onnxruntime() -> Any:
    """Import onnxruntime without its telemetry, which writes files to ~/.cache and sends data.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    return onnxruntime


def difference(path: Path, bundle: Bundle) -> float:
    """Compute the largest absolute difference between outputs of a file and a bundle on random audio.

    The result is NaN if an output is NaN.
    """
    session = import_onnxruntime().InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for seconds in CHECKED:
        wav_1T = torch.randn(1, round(seconds * SAMPLE_RATE), generator=generator)
        (output,) = session.run(None, {INPUT: wav_1T.numpy()})
        differences.append(np.abs(output - expected(bundle, wav_1T).numpy()).max())
    return float(np.max(differences))


def expected(bundle: Bundle, wav_1T: Tensor) -> Tensor:
    """Compute the reference output with the bundle's model."""
    with torch.inference_mode():
        if bundle.ctc is not None:
            log_probs: Tensor = bundle.ctc(wav_1T)[0]
            return log_probs
        top = bundle.config.layers
        encoded = bundle.model(wav_1T, keep_layers=range(top + 1))
        return torch.cat([*(encoded.layers[number] for number in range(top)), encoded.hidden_BSD])
