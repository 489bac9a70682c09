"""Tests that damaged model files give one error that names the file, and that no code in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from fixtures.foreign import KINDS, fairseq_settings, fairseq_state, model_of, torchaudio_state
from fixtures.hostile import Bomb, fairseq_content, unsign, write_archive
from safetensors.torch import load_file, save_file

from jahubert.cli import main as cli
from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.bundle import load_bundle, save_bundle, weights_hash
from jahubert.formats.fairseq import write_fairseq
from jahubert.formats.safe_pickle import Record, read_pickled
from jahubert.formats.state_dict import encoder_shapes
from jahubert.limits import VARIABLE
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertModel
from jahubert.phonemes import PhonemeSet


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "b"
    phonemes = PhonemeSet.standard()
    ctc = HubertForCtc(KINDS["base"], len(phonemes), model_of(KINDS["base"]))
    return save_bundle(folder, ctc=ctc, phonemes=phonemes)


@pytest.fixture
def signed(bundle_folder, tmp_path):
    """Return a bundle with checksums."""
    return shutil.copytree(bundle_folder, tmp_path / "b")


@pytest.fixture
def folder(signed):
    """Return a bundle without checksums."""
    return unsign(signed)


def assert_rejected(source, *names: str) -> None:
    """Check that the error is one line that contains `names`, and that the command exits with status 2."""
    with pytest.raises(CheckpointError) as caught:
        load_bundle(source)
    for name in names:
        assert name in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert cli.main(["info", str(source)]) == 2


# --- code execution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["settings", "weights", "optimizer"])
def test_pickle_that_would_run_code_is_rejected(tmp_path, part):
    content = fairseq_content()
    bomb = Bomb(tmp_path / "bang")
    if part == "settings":
        content["cfg"]["model"]["dropout"] = bomb
    elif part == "weights":
        content["model"]["mask_emb"] = bomb
    else:
        content["last_optimizer_state"] = [bomb]
    torch.save(content, tmp_path / "model.pt")
    assert_rejected(tmp_path / "model.pt", "model.pt", "mkdir")
    assert not (tmp_path / "bang").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "bang").exists(), "the file must run code when it is opened without restriction"


def test_pytorch_model_bin_that_would_run_code_is_rejected(folder, tmp_path):
    torch.save({"a": Bomb(tmp_path / "bang")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_rejected(folder, "pytorch_model.bin", "mkdir")
    assert not (tmp_path / "bang").exists()


def test_objects_of_foreign_classes_become_records(tmp_path):
    code = pickle.dumps({"a": 1}, 2)
    code = b"cfairseq.evil\nThing\n(X\x01\x00\x00\x00xtR" + code[2:-1] + b"b."
    record = read_pickled(write_archive(tmp_path / "a.pt", code))
    assert type(record) is Record and record.args == ("x",) and record.state == {"a": 1}
    assert not hasattr(record, "a")


def test_limits_can_be_raised(tmp_path, monkeypatch):
    torch.save({f"{n}": [n] * 100 for n in range(6000)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=VARIABLE):
        read_pickled(tmp_path / "a.pt")
    monkeypatch.setenv(VARIABLE, "10")
    assert len(read_pickled(tmp_path / "a.pt")) == 6000
    monkeypatch.setenv(VARIABLE, "many")
    with pytest.raises(ConfigError, match=VARIABLE):
        read_pickled(tmp_path / "a.pt")


def test_limit_on_layers_of_the_front_end_can_be_raised(tmp_path, monkeypatch):
    base = KINDS["base"]
    config = replace(
        base,
        conv_dims=base.conv_dims + base.conv_dims[-1:] * 60,
        conv_kernels=(*base.conv_kernels, *[1] * 60),
        conv_strides=(*base.conv_strides, *[1] * 60),
    )
    write_fairseq(tmp_path / "model.pt", HubertModel(config))
    assert_rejected(tmp_path / "model.pt", VARIABLE)
    monkeypatch.setenv(VARIABLE, "2")
    assert load_bundle(tmp_path / "model.pt").config.conv_strides == config.conv_strides


# --- damage -----------------------------------------------------------------------------------------------


def test_truncated_files_are_rejected(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for n_bytes in (0, 5, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:n_bytes])
        assert_rejected(folder, "model.safetensors")
    torch.save(fairseq_content(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for n_bytes in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:n_bytes])
        assert_rejected(tmp_path / "cut.pt", "cut.pt")


def test_missing_values_are_rejected(tmp_path):
    """One storage in the archive is truncated or missing."""
    torch.save(fairseq_content(), tmp_path / "a.pt")
    for change in ("short", "gone"):
        source = zipfile.ZipFile(tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / f"{change}.pt", "w") as out:
            for name in source.namelist():
                content = source.read(name)
                if name.endswith("data/3"):
                    if change == "gone":
                        continue
                    content = content[:-8]
                out.writestr(name, content)
        assert_rejected(tmp_path / f"{change}.pt", f"{change}.pt")


def test_damage_to_any_file_of_a_bundle_is_detected(signed):
    """Flipped bits, zeros and truncation in every file except the model card are detected."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(signed.iterdir()):
        if path.name == "README.md":
            continue
        whole = path.read_bytes()
        positions = torch.randint(len(whole), (12,), generator=generator).tolist()
        damaged = [whole[:-2], whole[: len(whole) // 2], b"", bytes(len(whole))]
        for position in positions:
            damaged.append(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(CheckpointError):
                load_bundle(signed)
        path.write_bytes(whole)
    load_bundle(signed)


def test_swapped_files_of_two_bundles_are_detected(signed, tmp_path):
    other = save_bundle(tmp_path / "other", model=model_of(replace(KINDS["base"], normalize=True)))
    for name in ("preprocessor_config.json", "config.json", "model.safetensors"):
        whole = (other / name).read_bytes()
        (other / name).write_bytes((signed / name).read_bytes())
        assert_rejected(other, name)
        (other / name).write_bytes(whole)
    (other / "model.safetensors").unlink()
    assert_rejected(other, "model.safetensors")


def test_weights_hash_of_an_older_bundle_is_compared(signed):
    info = json.loads((signed / "jahubert.json").read_text())
    weights = info["weights"]
    unsign(signed)
    info = json.loads((signed / "jahubert.json").read_text())
    (signed / "jahubert.json").write_text(json.dumps(info | {"weights": weights}))
    load_bundle(signed)
    (signed / "jahubert.json").write_text(json.dumps(info | {"weights": weights[::-1]}))
    assert_rejected(signed, "jahubert.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [torch.float32, torch.bfloat16])
def test_edited_bundle_with_rounded_weights_opens_without_its_checksums(tmp_path, dtype, in_memory):
    """If the recorded hash were not that of the weights in the file, the advice in the message would fail."""
    model = model_of(KINDS["base"]).to(in_memory)
    folder = save_bundle(tmp_path / "rounded", model=model, dtype=dtype)
    info = json.loads((folder / "jahubert.json").read_text())
    assert info["weights"] == weights_hash(load_bundle(folder).model)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]
    (folder / "jahubert.json").write_text(json.dumps(info | {"note": "edited"}))
    assert_rejected(folder, "jahubert.json")
    for name in ("checksum", "files"):
        del info[name]
    (folder / "jahubert.json").write_text(json.dumps(info | {"note": "edited"}))
    assert load_bundle(folder).info["note"] == "edited"


# --- mismatches -------------------------------------------------------------------------------------------


def test_mismatched_weights_are_rejected(folder):
    weights = load_file(folder / "model.safetensors")
    key = "hubert.encoder.layers.1.layer_norm.weight"

    def write(**changes):
        changed = {name: value for name, value in (weights | changes).items() if value is not None}
        save_file(changed, folder / "model.safetensors")

    write(**{key: None})
    assert_rejected(folder, "missing", "encoder.layers.1.layer_norm.weight")
    write(**{"hubert.quantizer.vars": torch.zeros(3)})
    assert_rejected(folder, "unknown", "quantizer.vars")
    write(**{key: torch.zeros(49)})
    assert_rejected(folder, "encoder.layers.1.layer_norm.weight", "(49,)", "(48,)")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"encoder_layers": 3}, ["layers 3, not 2"]),
        ({"encoder_layers": 1}, ["layers 1, not 2"]),
        ({"encoder_ffn_embed_dim": 64}, ["ffn 64, not 96"]),
        ({"encoder_layers": 10**9, "conv_pos": None}, ["layers 1000000000, not 2"]),
        ({"encoder_layers": 10**12}, ["encoder_layers"]),
        ({"encoder_attention_heads": 5}, ["heads is 5"]),
        ({"dropout": "${model.x}"}, ["dropout", "${model.x}"]),
        ({"activation_fn": "relu"}, ["activation_fn", "relu"]),
        ({"layer_type": "conformer"}, ["layer_type", "conformer"]),
        ({"_name": "wav2vec2"}, ["wav2vec2"]),
    ],
)
def test_mismatched_fairseq_settings_are_rejected(tmp_path, change, names):
    content = fairseq_content()
    content["cfg"]["model"] |= change
    torch.save(content, tmp_path / "model.pt")
    assert_rejected(tmp_path / "model.pt", "model.pt", *names)


def test_mismatched_fairseq_weights_are_rejected(tmp_path):
    content = fairseq_content()
    del content["model"]["encoder.pos_conv.0.bias"]
    content["model"]["quantizer.vars"] = torch.zeros(2)
    torch.save(content, tmp_path / "model.pt")
    assert_rejected(tmp_path / "model.pt", "encoder.pos_conv.0.bias", "quantizer.vars")
    torch.save({"model": content["model"]}, tmp_path / "bare.pt")
    assert_rejected(tmp_path / "bare.pt", "cfg")


def test_files_without_a_model_are_rejected(tmp_path, folder):
    torch.save([1, 2], tmp_path / "list.pt")
    assert_rejected(tmp_path / "list.pt", "list")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    assert_rejected(tmp_path / "other.pt", "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert_rejected(tmp_path / "text.pt", "text.pt")
    assert_rejected(folder / "model.safetensors", "config.json")
    assert_rejected(tmp_path / "nothing.pt", "nothing.pt")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    assert_rejected(tmp_path / "model.onnx", "ONNX")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "bang")}))
    assert_rejected(tmp_path / "bare.pt", "bare.pt")
    assert not (tmp_path / "bang").exists()


def test_files_older_than_pytorch_1_6_are_read(tmp_path):
    model = model_of(replace(KINDS["base"], width=128, heads=2))
    old = {"_use_new_zipfile_serialization": False}
    torch.save(torchaudio_state(model), tmp_path / "old.pt", **old)
    bundle = load_bundle(tmp_path / "old.pt")
    state = bundle.model.state_dict()
    assert bundle.config.heads == 2
    for name, value in model.state_dict().items():
        assert name == "masked_spec_embed" or state[name].equal(value)
    settings, task = fairseq_settings(KINDS["base"])
    content = {"cfg": {"model": settings, "task": task}, "model": fairseq_state(model_of(KINDS["base"]))[0]}
    torch.save(content, tmp_path / "fairseq.pt", **old)
    assert load_bundle(tmp_path / "fairseq.pt").unit_head is not None
    torch.save(content | {"more": Bomb(tmp_path / "bang")}, tmp_path / "bad.pt", **old)
    assert_rejected(tmp_path / "bad.pt", "bad.pt", "mkdir")
    assert not (tmp_path / "bang").exists()


def test_tensors_that_share_a_storage_are_read(tmp_path):
    """In this file, all tensors are views of one flat parameter buffer."""
    model = model_of(replace(KINDS["base"], width=128, heads=2))
    state = torchaudio_state(model)
    flat = torch.cat([value.flatten() for value in state.values()])
    views = flat.split([value.numel() for value in state.values()])
    shaped = {name: view.view_as(state[name]) for name, view in zip(state, views, strict=True)}
    torch.save(shaped, tmp_path / "flat.pt")
    loaded = load_bundle(tmp_path / "flat.pt").model.state_dict()
    for name, value in model.state_dict().items():
        assert name == "masked_spec_embed" or loaded[name].equal(value)


def test_torchaudio_settings_are_checked(tmp_path):
    torch.save(torchaudio_state(model_of(KINDS["base"])), tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({"arguments": {"encoder_num_heads": 5}}))
    assert_rejected(tmp_path / "a.pt", "a.json", "extractor_conv_bias")
    (tmp_path / "a.json").write_text("{")
    assert_rejected(tmp_path / "a.pt", "a.json", "JSON")


def test_mismatched_vocabularies_are_rejected(folder):
    (folder / "jahubert.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 42}))
    assert_rejected(folder, "pad_token_id", "42 outputs")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("[1, 2]")
    assert_rejected(folder, "vocab.json")
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "a\n": 1}))
    assert_rejected(folder, "vocab.json")
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 1, "|": 7}))
    symbols = load_bundle(folder).phonemes
    assert symbols.symbols[:3] == ("<blank>", "a", "<2>") and symbols.boundary == 7


@pytest.mark.parametrize("changes", [{}, {"conv_bias": True}, {"conv_norm": "layer", "layers": 1}])
def test_expected_shapes_are_those_of_the_model(changes):
    """The state dict must contain every tensor, because `load_bundle` skips random initialization."""
    config = replace(KINDS["base"], **changes)
    model = HubertModel(config)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name: tuple(value.shape) for name, value in tensors.items()} == encoder_shapes(config)
    assert tensors.keys() == model.state_dict().keys()


def test_opened_files_are_not_changed(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bundle = load_bundle(folder)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.zero_()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["b"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_prints_no_terminal_escapes(tmp_path, capsys, options):
    info = {"origin": {"a\x1b[2J": "b\x9b31m\u202e\U000e0001"}, "\x07name": "い\x7f"}
    save_bundle(tmp_path / "a", model=model_of(KINDS["base"]), info=info)
    assert cli.main(["info", *options, str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "い" in out and all(c.isprintable() or c == "\n" for c in out)
    if options:
        assert json.loads(out)["origin"]["origin"] == info["origin"]


def test_errors_print_no_terminal_escapes(tmp_path, capsys):
    content = fairseq_content()
    content["model"]["\x1b[2Jextra"] = torch.zeros(2)
    content["cfg"]["model"]["_name"] = "\x1b]0;title\x07"
    torch.save(content, tmp_path / "a.pt")
    write_archive(tmp_path / "b.pt", b"cos\x1b[2J\nsystem\n.")
    for name in ("a.pt", "b.pt"):
        assert cli.main(["info", str(tmp_path / name)]) == 2
        assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().err)
