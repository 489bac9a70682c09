"""Tests that resuming from an untrusted checkpoint never runs code in it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fixtures.hostile import Bomb
from fixtures.toy import Data, Toy
from torch.distributed.checkpoint.api import CheckpointException

from jahubert.errors import DataError
from jahubert.train.experiment.checksums import content_crc32, describe_outputs
from jahubert.train.trainer.checkpoint_reader import CheckpointPlanner, CheckpointReader
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import train

CONFIG = TrainConfig(max_steps=4, save_every=2, device="cpu", workers=0)


def test_metadata_that_would_run_code_is_rejected(tmp_path):
    train(Toy(), Data(), CONFIG, tmp_path)
    newest = tmp_path / "checkpoints" / "step_0000004"
    content = pickle.dumps(Bomb(tmp_path / "ran"))
    (newest / ".metadata").write_bytes(content)
    record = json.loads((newest / "run.json").read_text())
    record.pop("crc32")
    (newest / "run.json").unlink()
    record["files"] = describe_outputs(newest)
    (newest / "run.json").write_text(json.dumps(record | {"crc32": content_crc32(record)}))
    with pytest.raises(DataError, match="step_0000004"):
        train(Toy(), Data(), replace(CONFIG, max_steps=6), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_values_that_would_run_code_are_rejected(tmp_path):
    content = {"value": Bomb(tmp_path / "ran"), "tensor": torch.ones(3), "plain": (1, None, [0.5])}
    dcp.save(content, checkpoint_id=tmp_path / "checkpoint")
    state = {"tensor": torch.zeros(3), "plain": None}

    def load(state: dict) -> None:
        reader = CheckpointReader(tmp_path / "checkpoint")
        dcp.load(state, storage_reader=reader, planner=CheckpointPlanner())

    load(state)
    assert state["tensor"].equal(torch.ones(3)) and state["plain"] == (1, None, [0.5])
    with pytest.raises(CheckpointException):
        load({"value": None})
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_paths_outside_of_the_checkpoint_are_rejected(tmp_path):
    dcp.save({"tensor": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    path = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../b/__0_0.distcp"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException):
        dcp.load({"tensor": torch.zeros(3)}, storage_reader=CheckpointReader(tmp_path / "a"))
