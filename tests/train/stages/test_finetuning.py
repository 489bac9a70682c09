"""Tests of fine-tuning: presets, published settings, label subsets, blank plateau, and resuming."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from fixtures import FIXTURES
from fixtures.small_training import CONFIG, MODEL, Noise

from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.model.heads import HubertForCtc
from jahubert.train.data.augmentation import AugmentConfig
from jahubert.train.data.batches import CtcBatch, pad
from jahubert.train.data.manifest import Utterance, write_manifest
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import MicroBatch
from jahubert.train.evaluation.unit_checks import blank_problem
from jahubert.train.experiment.config import result_fields, structure
from jahubert.train.experiment.registry import data_folder
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.compose import compose
from jahubert.train.stages import finetune, targets
from jahubert.train.trainer import micro_batch
from jahubert.train.trainer import trainer as engine
from jahubert.train.trainer.optim import TrainConfig, lr_at

PRESETS = sorted(path.stem for path in data_folder("conf").glob("finetuning/*.yaml"))


@cache
def settings(*overrides: str) -> finetune.Config:
    tree = compose(["pretrained=model", *overrides, "stage=finetune"], "main")
    return structure(tree["finetune"], finetune.Config, "finetune")


def fairseq_tri_stage(step: int, peak: float, warmup: int, hold: int, decay: int) -> float:
    """Compute fairseq's tri-stage schedule: warm-up from 1 %, hold, exponential decay to 5 %, constant."""
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    if step < warmup + hold:
        return peak
    return peak * math.exp(math.log(0.05) * min(1.0, (step - warmup - hold) / decay))


@pytest.mark.parametrize(
    ("preset", "phases"),
    [
        ("10h", (8_000, 0, 72_000)),  # training ends after 17,000 steps of the decay
        ("1h", (1_300, 5_200, 6_500)),
        ("10min", (1_300, 5_200, 6_500)),
        ("csj-core", (4_500, 18_000, 22_500)),
        ("csj-all", (23_000, 92_000, 115_000)),
    ],
)
def test_preset_has_published_learning_rate_schedule(preset, phases):
    train = settings("recipe=csj", f"finetuning={preset}").train
    for step in np.linspace(0, train.max_steps - 1, 23).astype(int).tolist():
        assert lr_at(step, train) == pytest.approx(fairseq_tri_stage(step, train.lr, *phases), rel=2e-3)


def test_presets_have_published_settings_and_defaults_are_the_10h_preset():
    assert PRESETS == ["10h", "10min", "1h", "csj-all", "csj-core"]
    presets = {name: settings("recipe=csj", f"finetuning={name}") for name in PRESETS}
    assert {name: c.train.max_steps for name, c in presets.items() if name[0] == "1"} == {
        "10h": 25_000, "10min": 13_000, "1h": 13_000
    }  # fmt: skip
    assert [presets[name].hours for name in ("10min", "1h", "10h")] == pytest.approx([1 / 6, 1, 10], abs=1e-3)
    assert presets["csj-core"].hours is None and presets["csj-all"].head_only_steps == 0
    for config in presets.values():
        assert config.freeze_conv and config.layer_drop == 0.1 and config.best == "wer"
        assert config.train.batch_seconds == 1600 and config.mask.length == 10
    fields = result_fields(replace(presets["10h"], hours=None))
    assert fields == result_fields(
        finetune.Config(*(Path(fields[n]) for n in ("manifest", "targets", "pretrained")))
    )


def test_csj_preset_depends_on_subset():
    core, everything = settings("recipe=csj"), settings("recipe=csj", "subset=all")
    assert (core.train.max_steps, everything.train.max_steps) == (45_000, 230_000)
    assert settings("recipe=csj", "subset=/my/list.txt").train == core.train
    assert settings("recipe=csj", "subset=all", "finetuning=csj-core").train == core.train
    assert settings("recipe=csj", "finetuning=1h", "finetune.hours=2").hours == 2
    # A preset on the command line overrides the settings of a recipe.
    assert settings("recipe=tofugu").train.max_steps == 2_500
    assert settings("recipe=tofugu", "finetuning=1h").train.max_steps == 13_000
    with pytest.raises(ConfigError, match="finetuning=1hr"):
        settings("recipe=csj", "finetuning=1hr")


def test_hours_draw_random_nested_subsets():
    rng = np.random.default_rng(0)
    n_samples = rng.integers(1, 9, 500) * SAMPLE_RATE
    manifest = SimpleNamespace(n_samples=n_samples, indices=lambda split: np.arange(500))
    targets = SimpleNamespace(labeled_rows=np.arange(0, 500, 2))
    config = finetune.Config(Path("m"), Path("t"), Path("p"))

    def chosen_rows(**changes) -> set[int]:
        rows = finetune.choose_rows(manifest, targets, replace(config, **changes))
        assert (np.diff(rows) > 0).all()
        return set(rows.tolist())

    small, large = chosen_rows(hours=0.05), chosen_rows(hours=0.2)
    assert small < large < chosen_rows() == set(range(0, 500, 2))
    for hours, rows in ((0.05, small), (0.2, large)):
        assert hours - 9 / 3600 < n_samples[sorted(rows)].sum() / SAMPLE_RATE / 3600 <= hours
    assert max(large) > 400 and chosen_rows(hours=0.05, seed=1) != small
    assert chosen_rows(fraction=0.2) == set(range(0, 100, 2)) and chosen_rows(
        fraction=0.2, hours=99
    ) == chosen_rows(fraction=0.2)
    with pytest.raises(ConfigError, match="hours is 0, but must be positive"):
        replace(config, hours=0)


def test_blank_plateau_is_reported_only_if_it_lasts():
    long = {"max_steps": 25_000, "head_only_steps": 10_000}
    assert blank_problem(1.0, 1.0, 12_000, **long) is None  # the encoder has hardly been trained yet
    message = blank_problem(0.999, 0.97, 20_000, **long)
    assert message is not None and "97%" in message
    for setting in ("finetune.train.lr", "finetune.head_only_steps", "finetune.mask.prob"):
        assert setting in message
    assert blank_problem(0.9, 0.2, 20_000, **long) is None
    assert blank_problem(1.0, 1.0, 500, max_steps=1000) is not None
    assert blank_problem(1.0, 1.0, 50, max_steps=1000) is None


def test_run_on_blank_plateau_logs_a_warning(tmp_path, caplog):
    """The learning rate is too low to learn anything from the noise."""
    caplog.set_level(logging.WARNING)
    rough = FIXTURES / "rough"
    command = [f"recipe={rough}", f"exp={tmp_path}", "finetune.pretrained=null", "finetune.train.lr=1e-9"]
    for stage in ("prepare", "targets", "finetune"):
        runner.run([*command, f"stage={stage}"])
    assert "blank plateau" in caplog.text
    assert "valid_empty" in (tmp_path / "systems/main/finetune/metrics.jsonl").read_text()


def test_warmup_and_hold_must_not_exceed_all_steps():
    with pytest.raises(ConfigError, match="warmup and hold"):
        TrainConfig(schedule="tri_stage", warmup=0.7, hold=0.4)


class LabeledNoise(Noise):
    """Data source of noise utterances that have three symbols each."""

    def load(self, micro: MicroBatch) -> CtcBatch:  # type: ignore[override]
        wavs = [
            torch.from_numpy(seeded_rng(2, row).standard_normal(HUBERT.n_samples(30 + 5 * row))).float()
            for row in micro.rows
        ]
        n_symbols_B = torch.full((len(wavs),), 3)
        symbols_L = torch.arange(3 * len(wavs)) % 5 + 1
        lengths = torch.tensor([len(wav) for wav in wavs])
        return CtcBatch(pad(wavs), lengths, None, None, symbols_L, n_symbols_B)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_run_stopped_in_head_only_phase_is_resumed(stop, tmp_path, monkeypatch):
    """Runs with layer drop are stopped before, at and after the end of the head-only phase."""
    final_weights = []
    train_step = engine._TrainingRun.train_step

    def stopping_step(self):
        if self.step == stop:
            raise KeyboardInterrupt
        train_step(self)

    for name in ("whole", "stopped", "stopped"):
        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        ctc = HubertForCtc(replace(MODEL, layer_drop=0.5), 6)
        module = finetune.FineTuner(ctc, freeze_conv=True, head_only_steps=2, seed=3)
        config = replace(CONFIG, max_steps=6, save_every=1)
        with monkeypatch.context() as patch:
            if name == "stopped" and len(final_weights) == 1:
                patch.setattr(engine._TrainingRun, "train_step", stopping_step)
                with pytest.raises(KeyboardInterrupt):
                    engine.train(module, LabeledNoise(), config, tmp_path / name)
            else:
                engine.train(module, LabeledNoise(), config, tmp_path / name)
        final_weights.append(module.state_dict())
    for key, value in final_weights[0].items():
        assert torch.equal(final_weights[2][key], value), key


def noise_config(
    folder: Path, utterances: list[tuple[int, str]], unlabeled: str = "", **settings
) -> finetune.Config:
    """Write noise utterances, given as (samples, split), and configure one update without validation.

    Each utterance has one symbol, except those in the split `unlabeled`.
    """
    rng, items = np.random.default_rng(0), []
    for number, (n_samples, split) in enumerate(utterances):
        path = folder / f"{number}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(n_samples), SAMPLE_RATE)
        words = () if split == unlabeled else (("a",),)
        audio = AudioSource(str(path))
        items.append(Utterance(str(number), audio, n_samples=n_samples, words=words, split=split))
    write_manifest(folder / "manifest.arrow", items)
    for name in ("targets", "out"):
        (folder / name).mkdir()
    targets.run(targets.Config(folder / "manifest.arrow"), folder / "targets")
    train = replace(CONFIG, max_steps=1, groups=1)
    settings = {"model": MODEL, "train": train, "freeze_conv": False, "head_only_steps": 0} | settings
    return finetune.Config(folder / "manifest.arrow", folder / "targets", **settings)


@pytest.mark.parametrize("n_samples", [16_002, 16_001])
def test_automatic_micro_batch_holds_the_longest_utterance(n_samples, tmp_path, monkeypatch):
    """The utterance needs more than the usable memory, with and without a change of speed."""
    monkeypatch.setattr(micro_batch, "_CPU_BYTES", 1e3)
    augment = AugmentConfig(speed_prob=1.0 if n_samples == 16_001 else 0.0)
    config = noise_config(tmp_path, [(n_samples, "train"), (8_000, "dev")], augment=augment)
    assert finetune.run(config, tmp_path / "out")["utterances"] == 1


def test_training_split_without_targets_is_rejected(tmp_path):
    config = noise_config(tmp_path, [(8_000, "train"), (8_000, "dev")], unlabeled="train")
    with pytest.raises(DataError, match="split 'train'"):
        finetune.run(config, tmp_path / "out")


@pytest.mark.parametrize("dev_splits", [(), ("dev",)])
def test_development_set_is_required_only_for_validation(dev_splits, tmp_path):
    utterances = [(8_000, "train"), (8_000, "dev"), (8_000, "test")]
    config = noise_config(tmp_path, utterances, unlabeled="dev", dev_splits=dev_splits)
    metrics = finetune.run(config, tmp_path / "out")
    assert metrics["utterances"] == 1 and "best_step" not in metrics
    with pytest.raises((ConfigError, DataError), match="dev_splits"):
        finetune.run(replace(config, train=replace(config.train, valid_every=1)), tmp_path / "out")
