"""Tests of settings: conversion to dataclasses, error messages, and name resolution."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from jahubert.errors import ConfigError
from jahubert.train.experiment.config import result_fields, runtime_field, structure
from jahubert.train.experiment.registry import (
    FEATURES,
    STAGES,
    recipe_folder,
    recipe_module,
    recipe_reader,
    resolve,
)


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rate <= 0:
            raise ConfigError(f"rate is {self.rate}, but must be positive")


@dataclass(frozen=True)
class Outer:
    folder: Path
    kind: Literal["mfcc", "hubert"] = "mfcc"
    layer: int | None = None
    inner: Inner = field(default_factory=Inner)
    device: str = runtime_field("auto")


def test_values_are_converted_to_the_declared_types():
    config = structure({"folder": "a/b", "inner": {"rate": "5e-4", "sizes": [3]}, "layer": None}, Outer)
    assert config == Outer(Path("a/b"), "mfcc", None, Inner(5e-4, (3,)))


def test_all_mistakes_are_reported_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        structure(
            {"kind": "mfc", "inner": {"rates": 1, "sizes": "x"}, "layer": 2.5, "devise": "cpu"},
            Outer,
            "stage",
        )
    text = str(caught.value)
    assert text.startswith("the configuration has 6 mistakes:")
    assert "stage.devise: no such key; did you mean stage.device?" in text
    assert "stage.folder: required" in text
    assert "stage.kind: must be one of mfcc, hubert, found 'mfc'; did you mean mfcc?" in text
    assert "stage.layer: expected int, found 2.5" in text
    assert "stage.inner.rates: no such key; did you mean stage.inner.rate?" in text
    assert "stage.inner.sizes: expected a list, found 'x'" in text


def test_error_in_post_init_names_the_nested_setting():
    with pytest.raises(ConfigError, match=r"inner.rate is -1.0, but must be positive"):
        structure({"folder": "a", "inner": {"rate": -1}}, Outer)


def errors_of(stage: str, **settings) -> list[str]:
    """Return the error lines for invalid settings of a stage."""
    config = resolve(stage, STAGES, "stage").Config
    paths = {f.name: "x" for f in fields(config) if "Path" in str(f.type) and f.default is MISSING}
    with pytest.raises(ConfigError) as caught:
        structure(paths | settings, config, stage)
    title, *lines = str(caught.value).splitlines()
    assert title.startswith(f"the configuration has {len(lines)} mistake")
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        ("features", {"layer": 0, "batch_seconds": 0}, ["layer is 0", "batch_seconds is 0.0"]),
        ("features", {"layer": -1, "sample_frames": -5}, ["layer is -1", "sample_frames is -5"]),
        (
            "kmeans",
            {"n_clusters": 1, "n_init": 0, "held_out": 1},
            ["n_clusters is 1", "n_init is 0", "held_"],
        ),
        ("label", {"shard_size": 0, "batch_seconds": -1}, ["shard_size is 0", "batch_seconds is -1.0"]),
        ("finetune", {"dropout": 1, "hours": -1}, ["hours is -1.0", "dropout is 1.0", "pretrained"]),
        ("decode", {"beam": 0, "batch_seconds": 0}, ["beam is 0", "batch_seconds is 0.0", "n_best is 1"]),
        ("score", {"samples": -1}, ["samples is -1"]),
        ("report", {"examples": -1, "layer_frames": -1}, ["examples is -1", "layer_frames is -1"]),
        ("pretrain", {"penalty_weight": -1, "unit_dim": 0}, ["unit_dim is 0", "penalty_weight is -1.0"]),
        ("pretrain", {"mask": {"min_spans": -1, "prob": 1}}, ["mask.prob is 1.0", "mask.min_spans is -1"]),
        ("pretrain", {"crop": {"min_seconds": -1}}, ["crop.min_seconds is -1.0, but must be at least 0"]),
    ],
)
def test_out_of_range_numbers_are_reported_all_at_once(stage, settings, expected):
    errors = errors_of(stage, **settings)
    prefixes = [f"{stage}.{text}" for text in expected]
    assert len(errors) == len(prefixes)
    assert all(any(line.startswith(prefix) for line in errors) for prefix in prefixes), errors


def test_out_of_range_training_settings_are_reported():
    wrong = {
        "lr": 0, "eps": -1, "weight_decay": -1, "clip_norm": -1, "workers": -1, "keep_every": -5,
        "valid_every": -1, "save_every": 0, "warmup": -0.5, "final_lr": 5, "betas": [1.5, 0.9],
    }  # fmt: skip
    errors = errors_of("pretrain", train=wrong)
    assert len(errors) == len(wrong)
    assert {line.split(" ")[0] for line in errors} == {f"pretrain.train.{name}" for name in wrong}
    assert "pretrain.train.warmup is -0.5, but must be in [0, 1]" in errors
    assert errors_of("pretrain", train={"betas": [0.9]}) == [
        "pretrain.train.betas is [0.9], but must be two numbers in [0, 1)"
    ]


@pytest.mark.parametrize("value", [float("nan"), "nan", ".inf", "-inf", float("inf")])
def test_non_finite_number_is_rejected(value):
    with pytest.raises(ConfigError, match=r"inner.rate: expected (a finite number|float), found"):
        structure({"folder": "a", "inner": {"rate": value}}, Outer)


@dataclass(frozen=True)
class Fast:
    inner: Inner = Inner(rate=7.0)


def test_nested_default_keeps_its_unset_fields():
    assert structure({"inner": {"sizes": [5]}}, Fast).inner == Inner(rate=7.0, sizes=(5,))


def test_result_fields_exclude_runtime_settings():
    assert result_fields(Outer(Path("a"))) == {
        "folder": Path("a"),
        "kind": "mfcc",
        "layer": None,
        "inner.rate": 1e-3,
        "inner.sizes": [1, 2],
    }


def test_names_resolve_in_a_registry_or_by_path(tmp_path):
    assert resolve("mfcc", FEATURES, "features.kind").__name__ == "Mfcc"
    assert resolve("math:sqrt", FEATURES, "features.kind")(9) == 3
    (tmp_path / "feature.py").write_text("from helper import answer\n")
    (tmp_path / "helper.py").write_text("answer = 42\n")
    assert resolve(f"{tmp_path}/feature.py:answer", FEATURES, "features.kind") == 42
    for name, expected in {
        "mfc": "features.kind=mfc: no such kind; did you mean mfcc?",
        "nowhere:x": "nowhere",
        "math:nothing": "math has no 'nothing'",
        f"{tmp_path}/gone.py:x": "no such file",
    }.items():
        with pytest.raises(ConfigError) as caught:
            resolve(name, FEATURES, "features.kind")
        assert expected in str(caught.value)


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_follows_the_contract(name):
    stage = resolve(name, STAGES, "stage")
    assert (
        stage.__doc__
        and f"stage={name}" in stage.__doc__
        and "Reads" in stage.__doc__
        and "Writes" in stage.__doc__
    )
    assert isinstance(stage.VERSION, int)
    assert stage.Config.__dataclass_params__.frozen
    assert callable(stage.run)


def test_recipes_are_found_by_name_or_folder(tmp_path):
    assert (recipe_folder("demo") / "prepare.py").is_file()
    (tmp_path / "recipe.yaml").write_text("{}")
    assert recipe_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"recipe=dem: no such recipe; did you mean demo\?"):
        recipe_folder("dem")


def test_files_in_equally_named_folders_are_distinct(tmp_path):
    for number in (1, 2):
        folder = tmp_path / str(number) / "recipe"
        folder.mkdir(parents=True)
        (folder / "prepare.py").write_text(f"number = {number}\n")
        assert resolve(f"{folder}/prepare.py:number", FEATURES, "features.kind") == number


def test_each_recipe_imports_the_files_of_its_own_folder(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "recipe.yaml").write_text("{}")
        (tmp_path / str(number) / "equally_named.py").write_text(f"number = {number}\n")
        (tmp_path / str(number) / "prepare.py").write_text("from equally_named import number\n")
        assert recipe_module(str(tmp_path / str(number))).number == number
    with pytest.raises(ConfigError, match=r"other\.py"):
        recipe_module(str(tmp_path / "1"), "other")
    with pytest.raises(ConfigError, match="Config"):
        recipe_reader(str(tmp_path / "1"), "Config")
