"""Tests of the machine presets, SLURM variables for torch.distributed, and options of the CUDA allocator."""

from __future__ import annotations

import dataclasses
import os
import sys

import pytest

from jahubert.errors import ConfigError
from jahubert.model.hubert import HubertConfig
from jahubert.train.data.sampler import BatchSizes
from jahubert.train.experiment.config import result_fields
from jahubert.train.experiment.registry import data_folder
from jahubert.train.pipeline import command, runner
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.stages.pretrain import Config

GPUS = {"1gpu": 1, "4gpu": 4, "8gpu": 8, "32gpu": 8}


def pretraining(*overrides: str) -> Config:
    ((_, config, _),) = configure_jobs(["recipe=reazonspeech", "stage=pretrain", "data=/c", *overrides])
    return config


@pytest.mark.parametrize("model", ["base", "large", "xlarge"])
def test_update_does_not_depend_on_the_number_of_gpus(model):
    default = pretraining(f"model={model}")
    for machine, processes in GPUS.items():
        overrides = [f"machine={machine}", f"model={model}"]
        config = pretraining(*overrides)
        assert result_fields(config) == result_fields(default)
        assert config.train.batch_sizes.groups % 8 == 0 and config.train.device == "cuda"
        assert runner.processes_to_launch(["recipe=reazonspeech", "stage=pretrain", *overrides]) == processes


@pytest.mark.parametrize("recipe", [["csj", "subset=core"], ["csj", "subset=all"], ["reazonspeech"]])
@pytest.mark.parametrize(("machine", "processes"), [("1gpu", 1), ("4gpu", 4), ("8gpu", 8), ("32gpu", 32)])
def test_every_machine_preset_divides_the_published_batch(recipe, machine, processes, tmp_path):
    """Pretraining and fine-tuning keep the published global batch size."""
    command = [f"recipe={recipe[0]}", *recipe[1:], "stage=all", "data=/c"]
    if recipe[0] == "csj":
        command.append("pretrained=a/b")
    trained = {
        stage: config.train
        for stage, config, _ in configure_jobs([*command, f"machine={machine}", f"exp={tmp_path}"])
        if hasattr(config, "train")
    }
    assert "finetune" in trained and ("pretrain" in trained) == (recipe[0] == "reazonspeech")
    for stage, train in trained.items():
        assert train.batch_seconds == {"pretrain": 2800, "finetune": 1600}[stage]
        assert train.batch_sizes == BatchSizes(train.batch_seconds / 8, 8) and train.micro_seconds is None
        train.check_processes(processes, longest=15.625)


def test_model_presets_have_published_sizes():
    """The sizes are those of fairseq's hubert_{base_librispeech,large_librivox,xlarge_librivox}."""
    sizes = {
        "base": (HubertConfig.base(), 256, 5e-4, 10.0, 2800.0),
        "large": (HubertConfig.large(), 768, 1.5e-3, 1.0, 7200.0),
        "xlarge": (HubertConfig.xlarge(), 1024, 3e-3, 1.0, 5760.0),
    }
    for model, (config, unit_dim, lr, clip, batch) in sizes.items():
        preset = pretraining(f"model={model}")
        assert preset.model == config and preset.unit_dim == unit_dim
        train = preset.train
        assert (train.lr, train.clip_norm, train.batch_seconds) == (lr, clip, batch)
    for iteration, steps in ((1, 250_000), (2, 400_000)):
        train = pretraining(f"iteration={iteration}").train
        assert (train.max_steps, round(train.warmup * train.max_steps)) == (steps, 32_000)


def test_laptop_preset_overrides_the_recipe():
    config = pretraining("machine=laptop", "iteration=2", "pretrain.train.lr=1e-3")
    assert config.model.width == 192 and config.train.device == "cpu"
    assert (config.train.max_steps, config.train.batch_seconds, config.train.lr) == (6000, 30.0, 1e-3)
    with pytest.raises(ConfigError, match=r"machine=9gpu: no such machine; did you mean 8gpu\?"):
        pretraining("machine=9gpu")


@pytest.mark.parametrize("nodes", ["node[017-020,031],other3", "node017", "node017,node020"])
def test_srun_tasks_become_processes(nodes):
    slurm = {"SLURM_STEP_NUM_TASKS": "32", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41"}
    command.join_slurm(environment := {**slurm, "SLURM_STEP_NODELIST": nodes})
    assert environment.items() >= {
        "WORLD_SIZE": "32", "RANK": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "node017", "MASTER_PORT": "20041"
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "local"), [("0", "0"), ("GPU-8932f937", "0"), ("0,1,2,3", "3"), ("", "3"), (None, "3")]
)
def test_task_with_one_visible_gpu_uses_it(visible, local):
    """With `srun --gpus-per-task=1`, each task sees one GPU, which has index 0."""
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    environment |= {"SLURM_JOB_ID": "41", "SLURM_STEP_NODELIST": "node1"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command.join_slurm(environment)
    assert environment["LOCAL_RANK"] == local


def test_batch_script_and_torchrun_environments_are_unchanged():
    for before in (
        {"SLURM_NTASKS": "32", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "8", "RANK": "3"},
    ):
        command.join_slurm(environment := dict(before))
        assert environment == before


def test_allocator_extends_its_segments(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    seen = {}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(runner, "run", lambda overrides: seen.update(os.environ))
    assert runner.start(["recipe=demo", "stage=label"]) == 0
    assert seen["PYTORCH_ALLOC_CONF"] == seen["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_HIP_ALLOC_CONF" not in seen


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_allocator_options_of_the_user_are_kept(name):
    before = {name: "max_split_size_mb:256"}
    runner.configure_allocator(environment := dict(before))
    assert environment == before


def test_slurm_launcher_config_is_valid():
    launcher = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(data_folder("conf").resolve()), version_base="1.3"):
        tree = compose("config", ["hydra/launcher=slurm", "hydra.launcher.nodes=2"], return_hydra_config=True)
    settings = dict(tree.hydra.launcher)
    valid = {field.name for field in dataclasses.fields(launcher.SlurmQueueConf)} | {"_target_"}
    assert settings.keys() <= valid and settings["_target_"].endswith("SlurmLauncher")
    assert (settings["nodes"], settings["tasks_per_node"], settings["signal_delay_s"]) == (2, 8, 300)
