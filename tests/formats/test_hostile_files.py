"""Damaged and hostile model files: one clear error each, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from fixtures.foreign import KINDS, fairseq_settings, fairseq_state, model_of, torchaudio_state
from safetensors.torch import load_file, save_file

from jahubert.cli import main as cli
from jahubert.errors import CheckpointError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.formats.safe_pickle import read_pickled
from jahubert.model.heads import HubertForCtc
from jahubert.phonemes import PhonemeSet


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "b"
    phonemes = PhonemeSet.standard()
    ctc = HubertForCtc(KINDS["base"], len(phonemes), model_of(KINDS["base"]))
    return save_bundle(folder, ctc=ctc, phonemes=phonemes)


@pytest.fixture
def folder(bundle_folder, tmp_path):
    return shutil.copytree(bundle_folder, tmp_path / "b")


def refused(source, *says: str) -> None:
    """One sentence or two, with the file, what was found, and no traceback on the command line."""
    with pytest.raises(CheckpointError) as caught:
        load_bundle(source)
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert cli.main(["info", str(source)]) == 2


def fairseq_content() -> dict:
    model = model_of(KINDS["base"])
    settings, task = fairseq_settings(model.config)
    return {"cfg": {"model": settings, "task": task}, "model": fairseq_state(model)[0]}


class Bomb:
    """A pickle of it makes a folder when it is opened the usual way."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["settings", "weights", "elsewhere"])
def test_a_pickle_that_would_run_code(tmp_path, place):
    content = fairseq_content()
    bomb = Bomb(tmp_path / "bang")
    if place == "settings":
        content["cfg"]["model"]["dropout"] = bomb
    elif place == "weights":
        content["model"]["mask_emb"] = bomb
    else:
        content["last_optimizer_state"] = [bomb]
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "model.pt", "posix.mkdir", "Nothing of it was run")
    assert not (tmp_path / "bang").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "bang").exists(), "the bomb is a bomb"


def test_a_pytorch_model_bin_that_would_run_code(folder, tmp_path):
    torch.save({"a": Bomb(tmp_path / "bang")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin", "posix.mkdir")
    assert not (tmp_path / "bang").exists()


def program(tmp_path, code: bytes):
    """A PyTorch archive with this pickle program."""
    path = tmp_path / "program.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", code)
    return path


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(X\x04\x00\x00\x00exittR.",
        b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        b"c__builtin__\n__import__\n.",
        b"(X\x02\x00\x00\x00lsios\nsystem\n.",
        b"ctorch\nload\n.",
        b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n.",
        b"cjahubert.unpickle\nplain\n.",
        b"cargparse.__builtins__\neval\n(X\x03\x00\x00\x001+1tR.",
    ],
)
def test_programs(tmp_path, code):
    path = program(tmp_path, code)
    try:
        found = read_pickled(path)
    except CheckpointError as error:
        assert "program.pt" in str(error)
    else:  # what a family of records is named for is inert, whatever it is called
        assert type(found).__mro__[1].__name__ == "Record" and found.args == ("1+1",)


def test_records_do_nothing(tmp_path):
    """A foreign object keeps what it remembered; its methods are never looked up."""
    code = pickle.dumps({"a": 1}, 2)
    code = b"cfairseq.evil\nThing\n(X\x01\x00\x00\x00xtR" + code[2:-1] + b"b."
    found = read_pickled(program(tmp_path, code))
    assert found.args == ("x",) and found.state == {"a": 1} and not hasattr(found, "a")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('bang')",
        "[(24,10,5)] + __import__('os').listdir()",
        "[(24,10,5)] * 10 ** 9",
        "[(24,10,5)] * 1000000000",
        "[(24,10)]",
        "[(24,10,'5')]",
        "(" * 500 + ")" * 500,
        "[x for x in ()]",
        "",
        7,
    ],
)
def test_settings_that_fairseq_would_run(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = fairseq_content()
    content["cfg"]["model"]["conv_feature_layers"] = text
    torch.save(content, "model.pt")
    refused("model.pt", "conv_feature_layers", "Nothing was run", "(channels, kernel, stride)")
    assert not (tmp_path / "bang").exists()


def test_truncated_files(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for n_bytes in (0, 5, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:n_bytes])
        refused(folder, "model.safetensors", "truncated")
    torch.save(fairseq_content(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for n_bytes in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:n_bytes])
        refused(tmp_path / "cut.pt", "cut.pt", "copy it again")


def test_values_that_are_not_there(tmp_path):
    """An archive whose parts do not fit: bytes missing from one tensor, a tensor missing altogether."""
    torch.save({"model": fairseq_content()["model"], "cfg": fairseq_content()["cfg"]}, tmp_path / "a.pt")
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
        refused(tmp_path / f"{change}.pt", "damaged", f"{change}.pt")


def test_numbers_that_would_take_all_memory(tmp_path):
    """A place far behind the end of the memo; a tensor that repeats one value beyond all bounds."""
    assert read_pickled(program(tmp_path, b"\x80\x02}r\xff\xff\xff\xff.")) == {}
    content = fairseq_content()
    content["model"]["mask_emb"] = torch.zeros(1).expand(10**12)
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "damaged", "(1000000000000,)")


def test_weights_that_do_not_fit(folder):
    weights = load_file(folder / "model.safetensors")
    key = "hubert.encoder.layers.1.layer_norm.weight"

    def write(**changes):
        changed = {**weights, **{name: value for name, value in changes.items() if value is not None}}
        changed = {name: value for name, value in changed.items() if changes.get(name, value) is not None}
        save_file(changed, folder / "model.safetensors")

    write(**{key: None})
    refused(folder, "missing", "encoder.layers.1.layer_norm.weight")
    write(**{"hubert.quantizer.vars": torch.zeros(3)})
    refused(folder, "unknown ['quantizer.vars']")
    write(**{key: torch.zeros(49)})
    refused(folder, "encoder.layers.1.layer_norm.weight is (49,) and not (48,)")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder_layers": 3}, "the settings say layers 3, not 2"),
        ({"encoder_layers": 1}, "the settings say layers 1, not 2"),
        ({"encoder_ffn_embed_dim": 64}, "the settings say ffn 64, not 96"),
        ({"encoder_layers": 10**12, "conv_pos": None}, "the settings say layers 1000000000000, not 2"),
        ({"encoder_attention_heads": 5}, "not divisible by heads 5"),
        ({"dropout": "${model.x}"}, "describe no HuBERT"),
        ({"activation_fn": "relu"}, "activation_fn is 'relu'"),
        ({"layer_type": "conformer"}, "layer_type is 'conformer'"),
        ({"_name": "wav2vec2"}, "kind 'wav2vec2'"),
    ],
)
def test_fairseq_settings_that_do_not_fit(tmp_path, change, says):
    content = fairseq_content()
    content["cfg"]["model"] |= change
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "model.pt", says)


def test_fairseq_weights_that_do_not_fit(tmp_path):
    content = fairseq_content()
    del content["model"]["encoder.pos_conv.0.bias"]
    content["model"]["quantizer.vars"] = torch.zeros(2)
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "missing ['encoder.pos_conv.0.bias']", "unknown ['quantizer.vars']")
    torch.save({"model": content["model"]}, tmp_path / "bare.pt")
    refused(tmp_path / "bare.pt", "without settings")


def test_files_that_are_something_else(tmp_path, folder):
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds a list")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "no HuBERT")
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "text.pt")
    refused(folder / "model.safetensors", "give the folder")
    refused(tmp_path / "nothing.pt", "no such")
    buffer = io.BytesIO()
    pickle.dump({"model": Bomb(tmp_path / "bang")}, buffer)
    (tmp_path / "bare.pt").write_bytes(buffer.getvalue())
    refused(tmp_path / "bare.pt", "bare.pt")
    assert not (tmp_path / "bang").exists()


def test_files_of_old_pytorch(tmp_path):
    """Before 1.6 they were no archives; tensors alone are read by PyTorch's own restricted reader."""
    model = model_of(replace(KINDS["base"], width=128, heads=2))
    torch.save(torchaudio_state(model), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_bundle(tmp_path / "old.pt").config.heads == 2
    content = {"model": torchaudio_state(model), "more": Bomb(tmp_path / "bang")}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "bad.pt", "bad.pt")
    assert not (tmp_path / "bang").exists()


def test_settings_beside_a_state_dict(tmp_path):
    torch.save(torchaudio_state(model_of(KINDS["base"])), tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({"arguments": {"encoder_num_heads": 5}}))
    refused(tmp_path / "a.pt", "a.json: not the settings of a.pt", "docs/formats.md")
    (tmp_path / "a.json").write_text("{")
    refused(tmp_path / "a.pt", "a.json: not readable as JSON")


def test_vocabularies_that_do_not_fit(folder):
    (folder / "jahubert.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 42}))
    refused(folder, "pad_token_id", "is 42", "42 outputs")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("[1, 2]")
    refused(folder, "vocab.json", "expected a JSON object")
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 1, "|": 7}))
    found = load_bundle(folder).phonemes
    assert found.symbols[:3] == ("<blank>", "a", "<2>") and found.boundary == 7
    for damaged in ({"format": None}, {"config": 3}, {"config": {"teapot": 1}}, {"phonemes": [1]}):
        (folder / "jahubert.json").write_text(json.dumps(damaged))
        refused(folder, str(folder))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"masked_spec_embed": "../elsewhere.safetensors"}}, "files of this folder"),
        ({"weight_map": ["model-1.safetensors"]}, "files of this folder"),
        ({"weight_map": {"masked_spec_embed": "model-1.safetensors"}}, "model-1.safetensors is missing"),
    ],
)
def test_an_index_of_shards_that_does_not_fit(folder, index, says):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        load_bundle(folder)


def test_an_onnx_file_is_not_a_model_to_read(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(CheckpointError, match="is an ONNX file"):
        load_bundle(tmp_path / "model.onnx")
