"""Planning of a command: its stages, their validated settings and their output folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jahubert.errors import ConfigError
from jahubert.train.experiment.config import settings_error, structure, unknown_name_error, untyped
from jahubert.train.experiment.registry import STAGES, Job, recipe_names, resolve, stage_folder
from jahubert.train.pipeline.compose import compose, preset_names
from jahubert.train.pipeline.overrides import parse_overrides

PER_ITERATION = ("features", "kmeans", "label", "pretrain")
PER_SYSTEM = ("finetune", "decode", "score")


class PlannedStage(NamedTuple):
    """A stage of an experiment, with the iteration or the system if the stage has one."""

    stage: str
    iteration: int | None = None
    system: str | None = None


def configure_jobs(overrides: Sequence[str], check_inputs: bool = False) -> list[Job]:
    """Return all jobs of a command in order of execution.

    Args:
        check_inputs: whether to run the preflight checks. Use this for jobs that will run on this machine.

    Raises:
        ConfigError: settings are invalid, or a preflight check failed. Errors in several jobs are
            reported together.
    """
    tree = compose(overrides)
    planned = plan_stages(tree)
    jobs: list[Job] = []
    mistakes: list[str] = []
    settings: dict[str, None] = {}  # an ordered set, because several iterations may report the same error
    for stage in planned:
        try:
            jobs.append(configure_job(stage, overrides))
        except ConfigError as error:
            settings |= dict.fromkeys(error.settings)
            if not error.settings:
                mistakes.append(str(error))
    if settings:
        mistakes.insert(0, str(settings_error(list(settings))))
    if not mistakes:
        mistakes += _unused_pretrained(overrides, tree, jobs) + _unused_model(overrides, tree, jobs)
        mistakes += _unused_iterations(overrides, tree, planned) + _unused_in_training(overrides, jobs)
        mistakes += _unused_in_kmeans(overrides, jobs)
    if check_inputs:
        from jahubert.train.pipeline import preflight

        outputs = [output_folder(tree, stage) for stage in planned]
        mistakes += preflight.preflight_errors(jobs, outputs, int(os.environ.get("WORLD_SIZE", 1)))
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return jobs


def _unused_pretrained(overrides: Sequence[str], tree: dict[str, Any], jobs: Sequence[Job]) -> list[str]:
    """Return an error message if `pretrained=` is given but no system uses this model."""
    model, used = tree["pretrained"], [job.config.pretrained for job in jobs if job.stage == "finetune"]
    is_typed = any(override.key == "pretrained" for override in parse_overrides(overrides))
    if not is_typed or model is None or not used or Path(model) in used:
        return []
    return [
        f"pretrained={model} has no effect: the recipe, one of its systems or the command line "
        f"sets finetune.pretrained={', '.join(sorted({str(other or 'null') for other in used}))}"
    ]


def _unused_model(overrides: Sequence[str], tree: dict[str, Any], jobs: Sequence[Job]) -> list[str]:
    """Return an error message if sizes of the model are given but every system uses a pretrained model."""
    typed = [o.key for o in parse_overrides(overrides) if o.key.partition(".")[0] == "model"]
    pretrained = [job.config.pretrained for job in jobs if job.stage == "finetune"]
    if not typed or tree["iterations"] or not pretrained or None in pretrained:
        return []
    return [
        f"without pretraining (iterations=0), setting {', '.join(typed)} has no effect: each system has the "
        "sizes of its pretrained model"
    ]


def _unused_iterations(
    overrides: Sequence[str], tree: dict[str, Any], planned: Sequence[PlannedStage]
) -> list[str]:
    """Return an error message per typed setting of an iteration that `stage=all` does not run."""
    if tree["stage"] != "all":
        return []
    used = {(str(stage.iteration), stage.stage) for stage in planned}
    settings = [
        (iteration, stage)
        for override in parse_overrides(overrides)
        if override.key.partition(".")[0] == "by_iteration" and not override.delete
        for iteration, stage in _iteration_stages(override.key.split(".")[1:], override.value)
    ]
    return [
        f"by_iteration.{iteration}.{stage} has no effect: with iterations={tree['iterations']}, stage=all "
        "does not run this stage in this iteration"
        for iteration, stage in settings
        if stage in PER_ITERATION and (iteration, stage) not in used
    ]


def _iteration_stages(path: Sequence[str], value: Any) -> list[tuple[str, str]]:
    """Return the pairs of iteration and stage that a value below `by_iteration` sets."""
    if len(path) >= 2:
        return [(path[0], path[1])]
    groups = value.items() if isinstance(value, Mapping) else ()
    return [pair for name, inner in groups for pair in _iteration_stages([*path, str(name)], inner)]


def _unused_in_training(overrides: Sequence[str], jobs: Sequence[Job]) -> list[str]:
    """Return an error message per typed setting that no training stage uses with its other settings."""
    typed = {override.key for override in parse_overrides(overrides)}
    mistakes = []
    for stage in ("pretrain", "finetune"):
        configs = [job.config for job in jobs if job.stage == stage]
        if not configs:
            continue
        hold = f"{stage}.train.hold"
        if hold in typed and all(config.train.schedule == "linear" for config in configs):
            mistakes.append(f"{hold} has no effect with {stage}.train.schedule=linear; set tri_stage")
        for key in sorted(typed):
            if not key.startswith(f"{stage}.augment.") or key.endswith("_prob"):
                continue
            name = f"{key.rpartition('.')[2].partition('_')[0]}_prob"
            share = f"{stage}.augment.{name}"
            if share not in typed and not any(getattr(config.augment, name) for config in configs):
                mistakes.append(f"{key} has no effect, because {share} is 0; set {share}, for example to 0.3")
    return mistakes


def _unused_in_kmeans(overrides: Sequence[str], jobs: Sequence[Job]) -> list[str]:
    """Return an error message per typed setting that the k-means backend of no iteration uses."""
    typed = {override.key for override in parse_overrides(overrides)}
    backends = sorted({job.config.backend for job in jobs if job.stage == "kmeans"})
    if not backends:
        return []
    from jahubert.train.stages.kmeans import UNUSED_OPTIONS

    unused = set.intersection(*(set(UNUSED_OPTIONS[backend]) for backend in backends))
    return [
        f"kmeans.{name} has no effect with kmeans.backend={', '.join(backends)}"
        for name in sorted(unused)
        if f"kmeans.{name}" in typed
    ]


def configure_job(planned: PlannedStage, overrides: Sequence[str]) -> Job:
    """Validate the settings of one stage.

    Raises:
        ConfigError: settings are invalid; the message lists all errors.
    """
    stage, iteration, system = planned
    tree = compose([*overrides, *([f"iteration={iteration}"] if iteration else [])], system)
    config = structure(tree[stage] or {}, resolve(stage, STAGES, "stage").Config, stage)
    if stage == "features":
        _check_layer(tree, config)
    if stage == "finetune":
        _check_pretrained(tree, config)
    return Job(stage, config, output_folder(tree, planned))


def output_folder(tree: dict[str, Any], planned: PlannedStage) -> Path:
    """Return the output folder of a planned stage."""
    return Path(tree["exp"]) / stage_folder(*planned, tree["decoding"])


def _check_layer(tree: dict[str, Any], config: Any) -> None:
    """Raise ConfigError for a layer that the model of the previous iteration will not have."""
    from jahubert.model.hubert import HubertConfig

    bundle = Path(tree["exp"]) / f"iter{tree['iteration'] - 1}" / "pretrain" / "bundle"
    n_layers = untyped((tree["model"] or {}).get("layers", HubertConfig().layers))
    is_too_high = isinstance(config.layer, int) and isinstance(n_layers, int) and config.layer > n_layers
    if config.model == bundle and is_too_high:
        raise ConfigError(
            f"features.layer: iteration {tree['iteration']} uses layer {config.layer}, but the last layer of "
            f"the model is {n_layers}; set features.layer in by_iteration or on the command line"
        )


def _check_pretrained(tree: dict[str, Any], config: Any) -> None:
    """Raise ConfigError for fine-tuning without a pretrained model and without pretraining iterations."""
    if tree["iterations"] == 0 and config.pretrained == Path(tree["exp"]) / "iter0" / "pretrain":
        raise ConfigError(
            "pretrained=... is missing: iterations=0 requires a model to fine-tune. To train from scratch, "
            "set finetune.pretrained=null"
        )


def plan_stages(tree: dict[str, Any]) -> list[PlannedStage]:
    """Return the stages selected by `stage=`, in execution order.

    Raises:
        ConfigError: the recipe is missing, or the stage, system or decoding is invalid.
    """
    if not tree["recipe"]:
        raise ConfigError(
            "recipe=... is missing; choose one of " + ", ".join(recipe_names()) + ", or use a folder"
        )
    stage, systems, iterations = tree["stage"], list(tree["systems"]), tree["iterations"]
    if stage != "all" and stage not in STAGES:
        raise ConfigError(unknown_name_error("stage", str(stage), [*STAGES, "all"], missing=stage is None))
    if tree["system"] is not None and tree["system"] not in systems:
        raise ConfigError(unknown_name_error("system", str(tree["system"]), systems))
    if tree["decoding"] is not None and not re.fullmatch(r"[\w.-]+", tree["decoding"]):
        raise ConfigError(f"decoding={tree['decoding']}: must consist of letters, digits and . _ -")
    if tree["system"]:
        systems = [tree["system"]]
    if stage in PER_ITERATION:
        return [PlannedStage(stage, tree["iteration"])]
    if stage in PER_SYSTEM:
        return [PlannedStage(stage, system=system) for system in systems]
    if stage != "all":
        return [PlannedStage(stage)]
    last = max(map(int, preset_names("iteration")))
    if iterations >= last:
        raise ConfigError(
            f"iterations={iterations}: must be at most {last - 1} with stage=all, which also fits units to "
            "the model of the last iteration"
        )
    planned = [PlannedStage("prepare")]
    for iteration in range(1, iterations + 1):
        planned += [PlannedStage(name, iteration) for name in PER_ITERATION]
    if iterations:  # fit units to the last model, for `jahubert units` and the report
        planned += [PlannedStage(name, iterations + 1) for name in PER_ITERATION if name != "pretrain"]
    planned.append(PlannedStage("targets"))
    for system in systems:
        planned += [PlannedStage(name, system=system) for name in PER_SYSTEM]
    planned.append(PlannedStage("report"))
    return planned
