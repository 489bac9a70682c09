"""Tests of ONNX export: equal results in onnxruntime, the `convert` command, and its errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.foreign import KINDS, model_of

from jahubert.cli import main as cli
from jahubert.errors import ConfigError, MissingExtraError
from jahubert.formats import onnx as onnx_format
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.formats.convert import convert
from jahubert.formats.onnx import INPUT, OnnxGraph, difference, expected
from jahubert.model.heads import HubertForCtc
from jahubert.phonemes import PhonemeSet

PHONEMES = PhonemeSet.standard()
LENGTHS = (400, 719, 720, 1040, 7001, 16_000, 48_123, 160_000)


ALL = [(kind, ctc) for kind in KINDS for ctc in (True, False)]


@pytest.fixture
def bundle(request, tmp_path):
    kind, ctc = request.param
    model = model_of(KINDS[kind])
    if ctc:
        head = HubertForCtc(model.config, len(PHONEMES), model)
        torch.nn.init.normal_(head.lm_head.weight)
        save_bundle(tmp_path / "bundle", ctc=head, phonemes=PHONEMES)
    else:
        save_bundle(tmp_path / "bundle", model=model)
    return tmp_path / "bundle"


@pytest.mark.parametrize("bundle", ALL, ids=str, indirect=True)
def test_exported_module_equals_the_model(bundle):
    opened = load_bundle(bundle)
    graph = OnnxGraph(opened).eval()
    for n in LENGTHS:
        wav = torch.randn(1, n, generator=torch.Generator().manual_seed(n))
        with torch.inference_mode():
            output = graph(wav)
        torch.testing.assert_close(output, expected(opened, wav), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "bundle",
    [pytest.param(each, marks=() if each[1] == (each[0] == "base") else pytest.mark.slow) for each in ALL],
    ids=str,
    indirect=True,
)
def test_file_equals_the_model_for_every_length(bundle, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    done = convert(bundle, tmp_path / "model.onnx", "onnx")
    assert done.difference < 1e-4
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    opened = load_bundle(bundle)
    for n in LENGTHS:
        wav = torch.randn(1, n, generator=torch.Generator().manual_seed(n)) * 0.3
        (output,) = session.run(None, {INPUT: wav.numpy()})
        expected_output = expected(opened, wav).numpy()
        assert output.shape == expected_output.shape and output.dtype == np.float32
        assert np.abs(output - expected_output).max() < 1e-4, n
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["sample_rate"]) == 16_000
    if opened.ctc is not None:
        assert json.loads(metadata["symbols"]) == list(PHONEMES.symbols)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model.onnx"]


def test_convert_command_writes_an_onnx_file(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    save_bundle(tmp_path / "bundle", model=model_of(next(iter(KINDS.values()))))
    assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "a.onnx"), "--to", "onnx"]) == 0
    out, err = capsys.readouterr()
    assert "largest absolute difference" in out and err == ""
    assert str(Path(onnx_format.__file__).parent).encode() not in (tmp_path / "a.onnx").read_bytes()
    assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "a.pt"), "--to", "onnx"]) == 2
    assert ".onnx" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [None, "0"])
def test_onnxruntime_is_imported_without_its_telemetry(tmp_path, monkeypatch, setting):
    """The telemetry of onnxruntime writes to ~/.cache and sends data. An explicit setting is kept."""
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", str(setting))  # restored after the test
    if setting is None:
        del os.environ["ORT_DISABLE_TELEMETRY"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))
    with pytest.raises(MissingExtraError):
        difference(tmp_path / "a.onnx", load_bundle(tmp_path / "a"))
    assert os.environ["ORT_DISABLE_TELEMETRY"] == (setting or "1")


@pytest.mark.parametrize("constant", [np.nan, np.inf])
def test_difference_of_non_finite_outputs_is_not_finite(tmp_path, monkeypatch, constant):
    class Session:
        def __init__(self, path, providers):
            pass

        def run(self, names, inputs):
            with torch.inference_mode():
                output = expected(opened, torch.from_numpy(inputs[INPUT])).numpy()
            if len(inputs[INPUT][0]) < 16_000:
                output[0, 0, 0] = constant
            return [output]

    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))
    opened = load_bundle(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    assert not np.isfinite(difference(tmp_path / "a.onnx", opened))


def test_missing_extra_and_existing_files_are_reported(tmp_path, monkeypatch):
    save_bundle(tmp_path / "bundle", model=model_of(next(iter(KINDS.values()))))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"\.\[onnx\]"):
        convert(tmp_path / "bundle", tmp_path / "a.onnx", "onnx")
    with pytest.raises(ConfigError, match="bundle"):
        convert(tmp_path / "bundle", tmp_path / "bundle", "hf")
