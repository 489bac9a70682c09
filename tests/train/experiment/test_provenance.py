"""Tests of stage records: fingerprints, changed settings, inputs, and status."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jahubert.cli.main import main
from jahubert.errors import DataError, StaleError
from jahubert.formats.lock import run_lock
from jahubert.train.experiment.config import runtime_field
from jahubert.train.experiment.provenance import (
    DONE,
    STARTED,
    acquire,
    fingerprint,
    finish,
    read_record,
    stage_inputs,
    stage_states,
    status_table,
    write_json,
)


@dataclass(frozen=True)
class Config:
    source: Path
    size: int = 3
    device: str = runtime_field("cpu")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_json(folder / DONE, {"fingerprint": "f" * 64})
    return folder


def test_acquire_is_true_only_after_finish(tmp_path, source):
    out = tmp_path / "out"
    inputs = stage_inputs("kmeans", 1, Config(source))
    assert acquire(out, inputs) is False
    assert acquire(out, inputs) is False  # the stage restarts after a kill
    finish(out, inputs, {"inertia": 2.5}, seconds=1.25)
    assert acquire(out, inputs) is True
    record = json.loads((out / DONE).read_text())
    assert record["fingerprint"] == fingerprint(inputs)
    assert record["metrics"] == {"inertia": 2.5}
    assert record["settings"] == {"source": "f" * 64, "size": 3}


@pytest.mark.parametrize("finished", [False, True])
def test_changed_setting_is_named(tmp_path, source, finished):
    out, inputs = tmp_path / "out", stage_inputs("kmeans", 1, Config(source))
    acquire(out, inputs)
    if finished:
        finish(out, inputs, {}, 0.0)
    with pytest.raises(StaleError, match=r"kmeans\.size was 3, now 4") as caught:
        acquire(out, stage_inputs("kmeans", 1, Config(source, size=4)))
    assert ("was created" if finished else "was started") in str(caught.value)
    with pytest.raises(StaleError, match=r"kmeans .*version 1 to 2"):
        acquire(out, stage_inputs("kmeans", 2, Config(source)))


def test_runtime_setting_may_change(tmp_path, source):
    out = tmp_path / "out"
    acquire(out, stage_inputs("kmeans", 1, Config(source, device="cpu")))
    assert acquire(out, stage_inputs("kmeans", 1, Config(source, device="cuda"))) is False


def test_input_is_identified_by_its_fingerprint(tmp_path, source):
    before = stage_inputs("kmeans", 1, Config(source))
    moved = source.rename(tmp_path / "moved")
    assert stage_inputs("kmeans", 1, Config(moved)) == before
    write_json(moved / DONE, {"fingerprint": "e" * 64})
    acquire(tmp_path / "out", before)
    with pytest.raises(StaleError, match=r"kmeans.source was input ffffffff, now input eeeeeeee"):
        acquire(tmp_path / "out", stage_inputs("kmeans", 1, Config(moved)))


def test_external_content_is_part_of_the_inputs(tmp_path, source):
    write_json(source / DONE, {"fingerprint": "f" * 64, "metrics": {"content": "one"}})
    before = stage_inputs("kmeans", 1, Config(source))
    write_json(source / DONE, {"fingerprint": "f" * 64, "metrics": {"content": "two"}})
    assert stage_inputs("kmeans", 1, Config(source)) != before


def test_files_and_models_of_no_stage_are_identified_by_their_content(tmp_path):
    file, model, out = tmp_path / "words.txt", tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").touch()
    for path, content in ((file, file), (model, model / "model.safetensors")):
        content.write_text("one")
        before = stage_inputs("kmeans", 1, Config(path))
        acquire(out / path.name, before)
        acquire(out / path.name, stage_inputs("kmeans", 1, Config(path)))
        content.write_text("two")
        after = stage_inputs("kmeans", 1, Config(path))
        with pytest.raises(StaleError, match=r"kmeans\.source was .*, now "):
            acquire(out / path.name, after)


@pytest.mark.parametrize(
    ("other_files", "name", "is_read"),
    [
        ("", "config.json", True),
        ("", "preprocessor_config.json", True),
        ("", "vocab.json", True),
        ("", "added_tokens.json", True),
        ("", "tokenizer_config.json", True),
        ("", "jahubert.json", True),
        ("", "bundle/model.safetensors", True),
        ("jahubert.json", "language_model.arpa.gz", True),
        ("jahubert.json", "centroids.safetensors", True),
        ("jahubert.json", "pretraining_heads.safetensors", True),
        ("", "centroids.safetensors", False),
        ("", "pytorch_model.bin", True),
        ("model.safetensors", "pytorch_model.bin", False),
        ("model.safetensors.index.json", "one.safetensors", True),
        ("pytorch_model.bin.index.json", "one.safetensors", True),
        ("model.safetensors.index.json", "two.safetensors", False),
        ("pytorch_model.bin", "model.safetensors.index.json", False),
        ("", "training_args.bin", False),
        ("", "trainer_state.json", False),
        ("", "README.md", False),
    ],
)
def test_files_that_are_read_are_the_identity_of_a_model_folder(tmp_path, other_files, name, is_read):
    model, out = tmp_path / "model", tmp_path / "out"
    changed = model / name
    changed.parent.mkdir(parents=True)
    for file in ("config.json", *other_files.split()):
        write_json(changed.parent / file, {"weight_map": {"a": "one.safetensors"}})
    changed.write_text('{"a": 1}')
    acquire(out, stage_inputs("kmeans", 1, Config(model)))
    acquire(out, stage_inputs("kmeans", 1, Config(model)))
    changed.write_text('{"a": 2}')
    after = stage_inputs("kmeans", 1, Config(model))
    if not is_read:
        acquire(out, after)
        return
    with pytest.raises(StaleError, match=r"kmeans\.source"):
        acquire(out, after)


def test_json_file_next_to_another_model_or_file_is_not_part_of_its_identity(tmp_path):
    fairseq = {"feature_extractor.conv_layers.0.0.weight", "encoder.layers.0.self_attn.q_proj.weight"}
    torch.save({name: torch.zeros(1) for name in fairseq}, tmp_path / "model.pt")
    (tmp_path / "words.txt").write_text("word")
    for name in ("model.pt", "words.txt"):
        before = stage_inputs("kmeans", 1, Config(tmp_path / name))
        write_json((tmp_path / name).with_suffix(".json"), {})
        assert stage_inputs("kmeans", 1, Config(tmp_path / name)) == before


def test_settings_of_a_torchaudio_model_are_part_of_its_identity(tmp_path):
    model, settings, out = tmp_path / "model.pt", tmp_path / "model.json", tmp_path / "out"
    attention = "encoder.transformer.layers.0.attention.q_proj.weight"
    torch.save({name: torch.zeros(1) for name in ("feature_extractor.conv_layers.0.w", attention)}, model)
    settings.write_text("one")
    acquire(out, stage_inputs("kmeans", 1, Config(model)))
    settings.write_text("two")
    with pytest.raises(StaleError, match=r"kmeans\.source"):
        acquire(out, stage_inputs("kmeans", 1, Config(model)))


def test_python_file_of_a_setting_is_part_of_the_inputs(tmp_path, source):
    @dataclass(frozen=True)
    class Custom(Config):
        kind: str = f"{tmp_path}/custom.py:Feature"

    file, out = tmp_path / "custom.py", tmp_path / "out"
    file.write_text("class Feature: pass")
    acquire(out, stage_inputs("features", 1, Custom(source)))
    acquire(out, stage_inputs("features", 1, Custom(source)))
    file.write_text("class Feature: ...")
    with pytest.raises(StaleError, match=r"features\.kind was .*custom\.py"):
        acquire(out, stage_inputs("features", 1, Custom(source)))


def test_missing_and_unfinished_inputs_are_rejected(tmp_path):
    with pytest.raises(DataError, match=r"kmeans.source: .*/nowhere/features .*stage=features"):
        stage_inputs("kmeans", 1, Config(tmp_path / "nowhere/features"))
    with pytest.raises(DataError, match=r"kmeans.source: a/b "):
        stage_inputs("kmeans", 1, Config(Path("a/b")))  # Hub names are valid only for models
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    write_json(unfinished / STARTED, {})
    with pytest.raises(DataError, match="is not finished"):
        stage_inputs("kmeans", 1, Config(unfinished))


def test_status_shows_state_and_metrics(tmp_path, source):
    exp = tmp_path / "exp"
    inputs = stage_inputs("kmeans", 1, Config(source))
    acquire(exp / "iter1" / "kmeans", inputs)
    finish(exp / "iter1" / "kmeans", inputs, {"inertia": 2.5, "backend": "torch"}, 3.0)
    acquire(exp / "iter1" / "label", inputs)
    header, *lines = status_table(stage_states(exp)).splitlines()
    assert header.split() == ["stage", "state", "time", "result"]
    assert lines[0].split() == ["iter1/kmeans", "done", "3", "s", "inertia", "2.5", "backend", "torch"]
    assert lines[1].split()[:2] == ["iter1/label", "stopped"]
    trained = stage_inputs("pretrain", 1, Config(source)) | {"settings": {"train.max_steps": 400}}
    acquire(exp / "iter1" / "pretrain", trained)
    lines = '{"step": 90, "lr": 1}\n{"step": 100, "loss": 3.5, "lr": 1}\n{"step": 100, "valid_loss": 3}\n{"st'
    for written, shown in (("", "stopped"), (lines, "25 %")):
        (exp / "iter1" / "pretrain" / "metrics.jsonl").write_text(written)
        assert [state["state"] for state in stage_states(exp)] == ["done", "stopped", shown]
    shown = status_table(stage_states(exp)).splitlines()[-1]
    assert shown.split("  ")[-3:-1] == ["loss 3.5", "lr 1"] and "stopped" in shown
    with run_lock(exp / "iter1" / "pretrain"):
        (line,) = subprocess.run(
            [sys.executable, "-m", "jahubert", "status", str(exp)], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1:]
        assert f"running: process {os.getpid()} on {socket.gethostname()}" in line
    assert stage_states(exp)[0]["metrics"] == {"inertia": 2.5, "backend": "torch"}
    with pytest.raises(DataError, match="nothing"):
        stage_states(tmp_path / "nothing")


def test_record_of_other_types_is_rejected(tmp_path):
    fields = ("metrics", "settings", "outputs", "seconds", "fingerprint")
    records: list[object] = [{"fingerprint": "f"} | {key: value} for key in fields for value in (None, [1])]
    folder = tmp_path / "exp" / "kmeans"
    folder.mkdir(parents=True)
    (folder / STARTED).write_text('{"fingerprint": "f"}')
    for content in ("[]", "1", "{}", "[" * 100_000, *map(json.dumps, records)):
        for name in (DONE, STARTED):
            (folder / DONE).unlink(missing_ok=True)
            (folder / name).write_text(content)
            with pytest.raises(DataError, match=name):
                stage_states(tmp_path / "exp")
        (folder / STARTED).write_text('{"fingerprint": "f"}')


def test_setting_that_is_not_utf8_is_recorded(tmp_path):
    write_json(tmp_path / STARTED, {"fingerprint": "青", "settings": {"data": "\udc80"}})
    assert read_record(tmp_path / STARTED) == {"fingerprint": "青", "settings": {"data": "\udc80"}}


def test_status_detects_a_changed_record(tmp_path, source):
    inputs = stage_inputs("kmeans", 1, Config(source))
    acquire(tmp_path / "kmeans", inputs)
    finish(tmp_path / "kmeans", inputs, {"inertia": 2.5}, 3.0)
    record = tmp_path / "kmeans" / DONE
    record.write_text(record.read_text().replace("2.5", "2.6"))
    with pytest.raises(DataError, match=DONE):
        stage_states(tmp_path)


def test_status_escapes_control_characters(tmp_path, source, capsys):
    folder = tmp_path / "exp" / "a\x1b[2Jb"
    acquire(folder, stage_inputs("kmeans", 1, Config(source)))
    finish(folder, {}, {"backend": "x\x1b[31m"}, 3.0)
    assert main(["status", str(tmp_path / "exp")]) == 0
    assert "\x1b" not in capsys.readouterr().out
