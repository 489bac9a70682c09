"""Tests of the setting `tracker`, mostly with a replacement for the package wandb."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fixtures import FIXTURES
from fixtures.toy import TOY, Data, Toy

from jahubert import run
from jahubert.errors import ConfigError, MissingExtraError
from jahubert.train.experiment.checksums import describe_outputs
from jahubert.train.trainer.tracker import check_tracker
from jahubert.train.trainer.trainer import train

CONFIG = replace(TOY, max_steps=4, micro_seconds=6.0, log_every=2, save_every=2, tracker="wandb")


class FakeWandb(SimpleNamespace):
    """Replacement for wandb that records the arguments of `init` and the values of each run."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__(runs=[], Settings=dict)

    def init(self, **arguments):
        entry = SimpleNamespace(arguments=arguments, rows=[], finished=False)
        self.runs.append(entry)
        return SimpleNamespace(
            log=lambda values, step: entry.rows.append((step, values)),
            finish=lambda: setattr(entry, "finished", True),
        )


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_run_is_offline_and_has_the_metrics(wandb, tmp_path):
    train(Toy(), Data(), CONFIG, tmp_path)
    (only,) = wandb.runs
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(step, values["training/loss"]) for step, values in only.rows] == [
        (row["step"], row["loss"]) for row in rows
    ]
    assert only.finished
    assert only.arguments["mode"] == "offline" and only.arguments["config"]["lr"] == CONFIG.lr
    assert not (tmp_path / "tensorboard").exists()
    assert not any(name.startswith("wandb") for name in describe_outputs(tmp_path))


def test_resumed_run_continues_the_same_wandb_run(wandb, tmp_path):
    train(Toy(), Data(), replace(CONFIG, max_steps=2), tmp_path / "a")
    train(Toy(), Data(), CONFIG, tmp_path / "a")
    train(Toy(), Data(), CONFIG, tmp_path / "b")
    first, resumed, other = (entry.arguments["id"] for entry in wandb.runs)
    assert first == resumed != other
    assert {entry.arguments["resume"] for entry in wandb.runs} == {"allow"}
    assert [step for step, _ in wandb.runs[1].rows] == [4]


def test_installed_wandb_stores_offline_runs_with_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra wandb")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    train(Toy(), Data(), replace(CONFIG, max_steps=2), tmp_path)
    train(Toy(), Data(), CONFIG, tmp_path)
    stored = (tmp_path / "wandb" / "run_id.txt").read_text()
    files = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert files == [f"run-{stored}.wandb"] * 2


def test_environment_variables_of_wandb_are_honored(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(Toy(), Data(), CONFIG, tmp_path)
    assert wandb.runs[0].arguments["mode"] == "online" and wandb.runs[0].arguments["project"] == "mine"


def test_wandb_error_names_the_setting(wandb, tmp_path, monkeypatch):
    def fail(**_):
        raise wandb.Error("api key not configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ConfigError, match=r"train\.tracker=wandb: api key"):
        train(Toy(), Data(), CONFIG, tmp_path)


@pytest.mark.parametrize("module", [None, SimpleNamespace()], ids=["missing", "folder named wandb"])
def test_missing_wandb_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(MissingExtraError, match=r"\.\[wandb\]"):
        check_tracker(CONFIG)
    check_tracker(replace(CONFIG, tracker="tensorboard"))


def test_missing_wandb_is_reported_before_any_stage(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    exp = tmp_path / "exp"
    overrides = ["stage=all", "iterations=0", "finetune.pretrained=null", "finetune.freeze_conv=false"]
    assert (
        run.main([f"recipe={FIXTURES / 'rough'}", f"exp={exp}", *overrides, "finetune.train.tracker=wandb"])
        == 2
    )
    message = capsys.readouterr().err
    assert "finetune.train.tracker=wandb" in message and ".[wandb]" in message
    assert not exp.exists()
