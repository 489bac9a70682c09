"""Tests of model conversion to other formats and back, and of the `convert` command."""

from __future__ import annotations

import errno
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.foreign import (
    FAIRSEQ_EPS,
    KINDS,
    UNITS,
    dictionary_class,
    fairseq_settings,
    fairseq_state,
    model_of,
    same_state,
)

from jahubert.cli import main as cli
from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.atomic import temporary_path
from jahubert.formats.bundle import LanguageModel, load_bundle, save_bundle
from jahubert.formats.convert import convert, largest_difference
from jahubert.inference.confidence import Calibration, WordFeatures
from jahubert.inference.transcribe import Transcriber
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertModel
from jahubert.phonemes import BLANK, PhonemeSet


@pytest.fixture
def dictionary(monkeypatch):
    return dictionary_class(monkeypatch)


@pytest.fixture(params=KINDS, ids=list(KINDS))
def kind(request):
    return request.param


@pytest.mark.parametrize("to", ["hf", "fairseq", "torchaudio"])
@pytest.mark.parametrize("what", ["encoder", "pretrained", "recognizer"])
def test_round_trips_are_bit_equal(tmp_path, kind, to, what):
    model, phonemes = model_of(KINDS[kind]), PhonemeSet.standard()
    parts: dict = {"model": model}
    if what == "pretrained":
        parts["unit_head"] = UnitHead(48, UNITS)
    elif what == "recognizer":
        parts = {"ctc": HubertForCtc(model.config, len(phonemes), model), "phonemes": phonemes}
    save_bundle(tmp_path / "first", **parts)
    first = load_bundle(tmp_path / "first")
    out = tmp_path / ("model" if to == "hf" else "model.pt")
    done = convert(tmp_path / "first", out, to)
    assert done.difference < 1e-5
    convert(out, tmp_path / "second", "hf")
    second = load_bundle(tmp_path / "second")
    if to == "torchaudio" and what != "pretrained":
        assert any("mask embedding" in note for note in done.notes)
        second.model.masked_spec_embed.data = first.model.masked_spec_embed.data
    assert same_state(first.model, second.model)
    assert first.phonemes == second.phonemes
    for name in ("ctc", "unit_head"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None) and (one is None or same_state(one, other))
    eps = {"normalize_eps": FAIRSEQ_EPS} if to != "hf" else {}
    assert vars(second.config) == vars(first.config) | eps
    assert any("epsilon" in note for note in done.notes) == (to != "hf" and kind == "large")


def test_fairseq_file_is_bit_equal_after_a_round_trip(tmp_path, kind, dictionary):
    """A round trip through a bundle keeps the projection and the codebook, including its special rows."""
    model = model_of(KINDS[kind])
    state, *_ = fairseq_state(model)
    settings, task = fairseq_settings(model.config)
    torch.save({"model": state, "cfg": {"model": settings, "task": task}}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "b", "hf").difference == 0
    assert convert(tmp_path / "b", tmp_path / "c.pt", "fairseq").difference == 0
    again = torch.load(tmp_path / "c.pt", weights_only=False)  # needs the fixture `dictionary`
    assert again["model"].keys() == state.keys()
    assert all(again["model"][name].equal(state[name]) for name in state)
    exported = again["task_state"]["dictionaries"][0]
    assert isinstance(exported, dictionary) and exported.symbols[4:] == [str(unit) for unit in range(UNITS)]
    assert exported.indices["0"] == 4
    ours = again["cfg"]["model"]
    assert {name: ours[name] for name in settings if name in ours and name not in CHANGED} == {
        name: value for name, value in settings.items() if name in ours and name not in CHANGED
    }
    assert eval(ours["conv_feature_layers"]) == eval(settings["conv_feature_layers"])


CHANGED = ("conv_feature_layers", "label_rate")


def test_fairseq_dictionary_begins_with_its_special_symbols(tmp_path, dictionary):
    """The blank comes first as <s>, and special symbols that the model lacks get probability zero."""
    symbols = PhonemeSet(("あ", "|", "い", "[UNK]", BLANK))
    ctc = HubertForCtc(KINDS["base"], 5, model_of(KINDS["base"])).eval()
    save_bundle(tmp_path / "a", ctc=ctc, phonemes=symbols)
    done = convert(tmp_path / "a", tmp_path / "b.pt", "fairseq")
    assert any("blank first" in note for note in done.notes)
    content = torch.load(tmp_path / "b.pt", weights_only=False)
    symbols = content["task_state"]["target_dictionary"].symbols
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "あ", "|", "い", "[UNK]"]
    proj = content["model"]["w2v_encoder.proj.weight"]
    assert proj[0].equal(ctc.lm_head.weight[4]) and proj[4:].equal(ctc.lm_head.weight[:4].data)
    assert content["cfg"]["model"]["w2v_args"]["task"]["normalize"] is False
    assert load_bundle(tmp_path / "b.pt").phonemes.symbols == (BLANK, "あ", "|", "い", "[UNK]")


def test_zero_biases_of_the_front_end_are_dropped(tmp_path):
    model = model_of(replace(KINDS["large"], conv_bias=True, normalize_eps=FAIRSEQ_EPS))
    save_bundle(tmp_path / "real", model=model)
    for layer in model.feature_extractor.conv_layers:
        layer.conv.bias.data.zero_()
    save_bundle(tmp_path / "zero", model=model)
    for to in ("fairseq", "torchaudio"):
        assert convert(tmp_path / "real", tmp_path / f"real.{to}.pt", to).difference == 0
        done = convert(tmp_path / "zero", tmp_path / f"zero.{to}.pt", to)
        assert done.difference == 0 and any("biases" in note for note in done.notes)
        assert load_bundle(tmp_path / f"real.{to}.pt").config.conv_bias
        assert not load_bundle(tmp_path / f"zero.{to}.pt").config.conv_bias


@pytest.mark.parametrize("kind", ["base", "large"])
def test_front_end_as_wide_as_the_encoder_round_trips(tmp_path, dictionary, kind):
    """The channels are duplicated, because fairseq has a projection only between different widths."""
    model = model_of(replace(KINDS[kind], conv_dims=(48,) * 7, normalize_eps=FAIRSEQ_EPS))
    save_bundle(tmp_path / "a", model=model)
    done = convert(tmp_path / "a", tmp_path / "a.pt", "fairseq")
    assert done.difference < 1e-5 and any("front end" in note for note in done.notes)
    content = torch.load(tmp_path / "a.pt", weights_only=False)
    assert content["model"]["post_extract_proj.weight"].shape == (48, 96)
    assert eval(content["cfg"]["model"]["conv_feature_layers"])[-1][0] == 96
    loaded = load_bundle(tmp_path / "a.pt")
    assert loaded.config == model.config and same_state(loaded.model, model)


def test_identity_projection_is_left_out_in_fairseq(tmp_path, dictionary):
    model = model_of(replace(KINDS["base"], conv_dims=(48,) * 7))
    model.feature_projection.projection.weight.data = torch.eye(48)
    model.feature_projection.projection.bias.data.zero_()
    save_bundle(tmp_path / "b", model=model)
    assert convert(tmp_path / "b", tmp_path / "b.pt", "fairseq").difference == 0
    assert "post_extract_proj.weight" not in torch.load(tmp_path / "b.pt", weights_only=False)["model"]
    assert load_bundle(tmp_path / "b.pt").config.conv_dims[-1] == 48


@pytest.mark.parametrize("identity", [False, True])
def test_transformers_computes_the_same_with_equal_widths(tmp_path, dictionary, identity):
    """The model is converted to fairseq's format and back. Hugging Face's model always has a projection."""
    transformers = pytest.importorskip("transformers", reason="needs the extra dev")
    model = model_of(replace(KINDS["base"], conv_dims=(48,) * 7))
    if identity:
        model.feature_projection.projection.weight.data = torch.eye(48)
        model.feature_projection.projection.bias.data.zero_()
    save_bundle(tmp_path / "a", model=model)
    convert(tmp_path / "a", tmp_path / "a.pt", "fairseq")
    convert(tmp_path / "a.pt", tmp_path / "hf", "hf")
    other = transformers.HubertModel.from_pretrained(tmp_path / "hf").eval()
    wav_BT = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(wav_BT).hidden_BSD
        torch.testing.assert_close(other(wav_BT).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_normalization_epsilons_differ_on_quiet_audio(tmp_path):
    """The larger epsilon of fairseq reduces the level of quiet audio after normalization."""
    model = model_of(KINDS["large"])
    other = HubertModel(replace(KINDS["large"], normalize_eps=FAIRSEQ_EPS)).eval()
    other.load_state_dict(model.state_dict())
    wav_T = 1e-3 * torch.randn(4_000)
    with torch.no_grad():
        a, b = (m(wav_T[None]).hidden_BSD for m in (model, other))
        expected = torch.nn.functional.layer_norm(wav_T, wav_T.shape)
    torch.testing.assert_close(other.normalize(wav_T), expected)
    assert (a - b).abs().max() > 1e-5


@pytest.mark.parametrize("to", ["hf", "fairseq", "torchaudio", "onnx"])
def test_notes_name_every_part_that_is_dropped(tmp_path, monkeypatch, to):
    monkeypatch.setattr("jahubert.formats.convert._write_onnx", lambda target, bundle: 0.0)
    model, phonemes = model_of(KINDS["base"]), PhonemeSet.standard()
    (tmp_path / "ngram.arpa.gz").write_bytes(gzip.compress(b"an n-gram"))
    save_bundle(
        tmp_path / "bundle",
        ctc=HubertForCtc(model.config, len(phonemes), model),
        phonemes=phonemes,
        unit_head=UnitHead(48, UNITS),
        centroids_KD=torch.randn(4, 48),
        centroid_layer=1,
        info={"confidence": {"bias": 1.0}, "recipe": "demo"},
        language_model=LanguageModel(tmp_path / "ngram.arpa.gz", 0.4, 2.0),
    )
    done = convert(tmp_path / "bundle", tmp_path / {"hf": "out", "onnx": "out.onnx"}.get(to, "out.pt"), to)
    notes = [note.partition(":")[0] for note in done.notes]
    assert len(set(notes)) == len(notes)
    head = "projection of the pretraining head" if to == "fairseq" else "pretraining head"
    dropped = {head, "centroids", "n-gram", "confidence calibration", "origin of the model (jahubert.json)"}
    assert dropped & set(notes) == (set() if to == "hf" else dropped)


def test_calibration_is_stored_in_the_converted_model(tmp_path, capsys):
    phonemes = PhonemeSet.standard()
    ctc = HubertForCtc(KINDS["base"], len(phonemes), model_of(KINDS["base"]))
    save_bundle(
        tmp_path / "bundle", ctc=ctc, phonemes=phonemes, info={"confidence": {"bias": 9.0}, "recipe": "x"}
    )
    calibration = Calibration(0.5, WordFeatures(1.0, 2.0, 3.0, 4.0))
    (tmp_path / "calibration.json").write_text(json.dumps(calibration.to_json()))
    options = ["--calibration", str(tmp_path / "calibration.json"), "--to"]
    assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "new"), *options, "hf"]) == 0
    asr = Transcriber.from_pretrained(tmp_path / "new")
    assert asr.calibration == calibration and load_bundle(tmp_path / "new").info["recipe"] == "x"
    for to in ("fairseq", "kaldi"):
        assert cli.main(["convert", str(tmp_path / "bundle"), str(tmp_path / "a.pt"), *options, to]) == 2
        assert "--calibration" in capsys.readouterr().err


def test_convert_command_prints_the_difference_and_writes_settings(tmp_path, capsys):
    save_bundle(
        tmp_path / "a", model=model_of(KINDS["base"]), centroids_KD=torch.randn(4, 48), centroid_layer=1
    )
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt"), "--to", "torchaudio"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"done: {tmp_path / 'b.pt'}" and "largest absolute difference" in lines[-2]
    assert any("centroids" in line for line in lines[:-2])
    settings = json.loads((tmp_path / "b.json").read_text())
    assert settings["factory"] == "torchaudio.models.wav2vec2_model"
    assert settings["arguments"]["encoder_num_heads"] == 4
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt"), "--to", "fairseq"]) == 2
    assert "b.pt" in capsys.readouterr().err
    for name, message in (("c", "end in .pt"), ("b.json", "end in .pt"), ("b.pth", "b.json")):
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "a", tmp_path / name, "torchaudio")
    with pytest.raises(ConfigError, match="choose one of"):
        convert(tmp_path / "a", tmp_path / "c", "tensorrt")


def test_manifest_for_other_sources_than_units_is_rejected(tmp_path, capsys):
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))
    for to in ("hf", "kaldi"):
        command = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", to, "--manifest", "m.arrow"]
        assert cli.main(command) == 2
        assert "--manifest" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_interrupted_conversion_to_torchaudio_can_be_repeated(tmp_path):
    """The settings are written before the weights. An unrelated file of the same name is never replaced."""
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))
    convert(tmp_path / "a", tmp_path / "b.pt", "torchaudio")
    (tmp_path / "b.pt").unlink()
    convert(tmp_path / "a", tmp_path / "b.pt", "torchaudio")
    (tmp_path / "b.pt").unlink()
    for content in ("{}", "no JSON"):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(ConfigError, match=r"b\.json"):
            convert(tmp_path / "a", tmp_path / "b.pt", "torchaudio")


def test_temporary_file_of_a_complete_folder_is_removed_by_the_next_run(tmp_path, monkeypatch):
    """The complete folder is kept, like any existing target."""
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(PermissionError):
            convert(tmp_path / "a", tmp_path / "b", "hf")
    other = temporary_path(tmp_path / "c")
    other.touch()
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ConfigError, match="already exists"):
        convert(tmp_path / "a", tmp_path / "b", "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", other.name}
    assert largest_difference(load_bundle(tmp_path / "a"), load_bundle(tmp_path / "b")) == 0


def test_largest_difference_detects_a_changed_bias(tmp_path):
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]))
    one, other = load_bundle(tmp_path / "a"), load_bundle(tmp_path / "a")
    assert largest_difference(one, other) == 0
    other.model.encoder.layers[1].final_layer_norm.bias.data[3] += 0.5
    assert largest_difference(one, other) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("to", ["hf", "fairseq", "torchaudio"])
def test_model_with_nan_outputs_fails_verification(tmp_path, to):
    """The verification must also fail if the first compared outputs are finite."""
    model = model_of(KINDS["base"])
    model.encoder.layers[1].final_layer_norm.bias.data[3] = math.nan
    save_bundle(tmp_path / "a", model=model)
    with pytest.raises(CheckpointError, match="nan"):
        convert(tmp_path / "a", tmp_path / ("b" if to == "hf" else "b.pt"), to)
