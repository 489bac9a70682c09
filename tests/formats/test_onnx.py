"""ONNX files in onnxruntime against the model, for every length; the command; what is missing."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from fixtures.foreign import KINDS, model_of

from jahubert.cli import main as cli
from jahubert.errors import ConfigError, MissingExtraError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.formats.convert import convert
from jahubert.formats.onnx import INPUT, Plain, expected
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
def test_plain_arithmetic_is_the_models(bundle):
    opened = load_bundle(bundle)
    plain = Plain(opened.model, None if opened.ctc is None else opened.ctc.lm_head).eval()
    for n in LENGTHS:
        wav = torch.randn(1, n, generator=torch.Generator().manual_seed(n))
        with torch.inference_mode():
            found = plain(wav)
        torch.testing.assert_close(found, expected(opened, wav), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "bundle",
    [pytest.param(each, marks=() if each[1] == (each[0] == "base") else pytest.mark.slow) for each in ALL],
    ids=str,
    indirect=True,
)
def test_a_file_answers_as_the_model_for_every_length(bundle, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="extra onnx")
    pytest.importorskip("onnxscript", reason="extra onnx")
    done = convert(bundle, tmp_path / "model.onnx", "onnx")
    assert done.difference < 1e-4
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    opened = load_bundle(bundle)
    for n in LENGTHS:
        wav = torch.randn(1, n, generator=torch.Generator().manual_seed(n)) * 0.3
        (found,) = session.run(None, {INPUT: wav.numpy()})
        wanted = expected(opened, wav).numpy()
        assert found.shape == wanted.shape and found.dtype == np.float32
        assert np.abs(found - wanted).max() < 1e-4, n
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["sample_rate"]) == 16_000
    if opened.ctc is not None:
        assert json.loads(about["symbols"]) == list(PHONEMES.symbols)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model.onnx"]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="extra onnx")
    save_bundle(tmp_path / "bundle", model=model_of(next(iter(KINDS.values()))))
    assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "a.onnx"), "--to", "onnx"]) == 0
    out, err = capsys.readouterr()
    assert "largest absolute difference" in out and err == ""
    assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "a.pt"), "--to", "onnx"]) == 2
    assert ".onnx" in capsys.readouterr().err


def test_without_the_extra(tmp_path, monkeypatch):
    save_bundle(tmp_path / "bundle", model=model_of(next(iter(KINDS.values()))))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"jahubert\[onnx\]"):
        convert(tmp_path / "bundle", tmp_path / "a.onnx", "onnx")
    with pytest.raises(ConfigError, match="exists already"):
        convert(tmp_path / "bundle", tmp_path / "bundle", "hf")
