"""Composition of a command's settings from conf/, a recipe, a machine preset and the command line.

Settings come from these sources, in increasing order of precedence: the defaults in a stage's dataclass;
conf/config.yaml; the groups model= and iteration=; the recipe's fine-tuning preset (conf/finetuning);
recipe.yaml; the preset selected by finetuning=; the recipe's settings for the selected iteration and system
(its blocks in `by_iteration` and `systems`); the preset selected by machine=, followed by its own blocks; the
command line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, MissingExtraError, quote
from jahubert.train.experiment.config import (
    expand_user,
    is_null,
    raise_config_errors,
    range_errors,
    structure,
    unknown_key_error,
    unknown_name_error,
)
from jahubert.train.experiment.registry import (
    STAGES,
    data_folder,
    preset_file,
    recipe_folder,
    stage_folder,
)
from jahubert.train.pipeline.overrides import Override, parse_overrides

# Settings that select a file in conf/ or recipes/.
_GROUPS = ("recipe", "model", "iteration", "finetuning", "machine")


@dataclass(frozen=True)
class CommandSettings:
    """Settings of the pipeline itself, some of which conf/config.yaml also passes to the stages."""

    name: str
    exp: str
    iteration: int
    recipe: str | None = None
    stage: str | None = None
    system: str | None = None
    decoding: str | None = None
    finetuning: str | None = None
    machine: str | None = None
    pretrained: str | None = None
    iterations: int = 2
    processes: int = 1  # number of processes per machine
    machines: int = 1
    hang_timeout_minutes: float = 30.0  # 0: no timeout
    verify_large_inputs: bool = True

    def __post_init__(self) -> None:
        ranges = {
            "at least 0": ("iterations", "hang_timeout_minutes"),
            "at least 1": ("processes", "machines"),
        }
        errors = range_errors(self, ranges)
        errors += [f"{key} is empty" for key in ("name", "exp") if not getattr(self, key)]
        raise_config_errors(errors)


def compose(overrides: Sequence[str], system: str | None = None) -> dict[str, Any]:
    """Compose the tree of settings as plain values.

    Values from the command line remain text, except those of `CommandSettings`.

    Args:
        overrides: `key=value` settings from the command line.
        system: name of a system in the recipe; the settings of this system are included.

    Raises:
        ConfigError: an override, a setting of the pipeline, or a file in conf/ or the recipe is invalid.
        MissingExtraError: hydra-core is not installed.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise MissingExtraError("hydra-core", "train") from error
    typed = parse_overrides(overrides)
    groups = _selected_groups(typed)
    recipe = groups.get("recipe")
    presets = [_load_settings(recipe_folder(recipe) / "recipe.yaml")] if recipe else [{}]
    if "machine" in groups:
        _check_names({"machine": groups["machine"]})
        presets.append(_load_settings(data_folder("conf") / "machine" / f"{groups['machine']}.yaml"))
    sizes = [str(preset["model_size"]) for preset in presets if "model_size" in preset]
    model, iteration = groups.get("model", (sizes or ["base"])[-1]), groups.get("iteration", "1")
    _check_names({"model": model, "iteration": iteration})
    try:
        tree: Any = copy.deepcopy(_load_groups(data_folder("conf"), model, iteration))
        tree = _merge_presets(tree, presets, groups, typed, system)
        tree.name = Path(recipe).name if recipe else "unnamed"  # `recipe` may be the path of a folder
        for override in typed:
            _apply(tree, override)
        _finish(tree, groups, system, typed)
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    _check_keys(plain)
    fields = CommandSettings.__dataclass_fields__
    settings = structure({key: plain[key] for key in fields if key in plain}, CommandSettings)
    composed: dict[str, Any] = plain | {key: getattr(settings, key) for key in fields}
    return composed


def _selected_groups(typed: Sequence[Override]) -> dict[str, str]:
    """Return the selected preset of each group, omitting groups that are set to null."""
    groups: dict[str, str] = {}
    errors = []
    for override in typed:
        if override.key not in _GROUPS:
            continue
        if override.delete or not isinstance(override.value, str):
            kind, value = ("number", "N") if override.key == "iteration" else ("name", "NAME")
            advice = f"write {override.key}={value}"
            if override.key == "model":
                advice += ", or model.width=256 to change a single size"
            errors.append(f"{override.key}=... must be a {kind}; {advice}")
        elif is_null(override.value):
            groups.pop(override.key, None)
        else:
            groups[override.key] = override.value
    raise_config_errors(errors)
    return groups


@cache
def _load_groups(conf: Path, model: str, iteration: str) -> Any:
    """Load conf/config.yaml with the given presets of its groups."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    selected = [f"model='{model}'", f"iteration='{iteration}'"]  # quoted, because names may be numbers
    if GlobalHydra.instance().is_initialized():  # this process is a job of Hydra's multirun
        tree = hydra_compose("config", overrides=selected)
    else:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            tree = hydra_compose("config", overrides=selected)
    OmegaConf.set_struct(tree, False)
    return tree


def _merge_presets(
    tree: Any,
    presets: Sequence[Any],
    groups: Mapping[str, str],
    typed: Sequence[Override],
    system: str | None,
) -> Any:
    """Merge presets and the `by_iteration` and `systems` settings of the command line into the tree.

    The presets are those of fine-tuning, of the recipe and of the machine (for their order, see the docstring
    of this module).
    """
    from omegaconf import OmegaConf

    recipe = presets[0]
    subset = next((o.value for o in reversed(typed) if o.key == "subset"), recipe.get("subset"))
    recipe_preset = preset_file(recipe.get("finetuning"), subset)
    typed_preset = preset_file(groups.get("finetuning"))
    if recipe_preset:
        tree = OmegaConf.merge(tree, {"finetune": OmegaConf.load(recipe_preset)})
    for preset in presets:
        layers = [preset]
        if preset is recipe and typed_preset:
            layers.append({"finetune": OmegaConf.load(typed_preset)})
        layers += _blocks(preset, tree.iteration, system)
        tree = OmegaConf.merge(tree, *layers)
    return OmegaConf.merge(tree, *_blocks(_typed_blocks(typed), tree.iteration, system))


def _blocks(preset: Any, iteration: int, system: str | None) -> list[Any]:
    """Return the blocks of a preset for an iteration and a system."""
    return [_block(preset, "by_iteration", iteration), _block(preset, "systems", system)]


def _block(preset: Any, group: str, name: Any) -> Any:
    """Return the block of a preset for one iteration or system."""
    from omegaconf import OmegaConf

    blocks = preset.get(group)
    if not OmegaConf.is_dict(blocks):
        return {}
    settings = next((blocks[key] for key in blocks if str(key) == str(name)), None)
    if is_null(settings):
        return {}
    if not OmegaConf.is_dict(settings):
        raise ConfigError(f"{group}.{name}: expected a group of settings, found {quote(settings)}")
    return settings


def _typed_blocks(typed: Sequence[Override]) -> Any:
    """Return the settings of iterations and systems given on the command line, in the form of a preset."""
    from omegaconf import OmegaConf

    blocks = OmegaConf.create({"by_iteration": {}, "systems": {}})
    inner = [o for o in typed if o.key.partition(".")[0] == "by_iteration"]
    names = [o.key.split(".")[1] for o in inner if "." in o.key]
    errors = _name_errors("iteration", names, where="by_iteration")
    errors += [
        f"{o.key} cannot be deleted; set the values of the iteration instead"
        for o in inner
        if o.delete or (o.key.count(".") < 2 and is_null(o.value))
    ]
    raise_config_errors(errors)
    for override in typed:
        if override.key.partition(".")[0] in blocks and not override.delete:
            OmegaConf.update(blocks, override.key, override.value, force_add=True)
    return blocks


def _apply(tree: Any, override: Override) -> None:
    """Set or delete one setting in the tree."""
    from omegaconf import OmegaConf

    key, value = override.key, override.value
    if key in ("model", "iteration") or key.startswith("by_iteration."):  # already in the tree
        return
    if not override.delete:
        parent: Any = tree
        for part in key.split(".")[:-1]:
            if not OmegaConf.is_dict(parent) or is_null(parent.get(part)):
                break
            parent = parent.get(part)
        else:
            if not OmegaConf.is_dict(parent):
                raise ConfigError(
                    f"{key}: {key.rpartition('.')[0]} is a single value, not a group of settings"
                )
        if OmegaConf.is_dict(OmegaConf.select(tree, key)) and is_null(value):
            value = None
        OmegaConf.update(tree, key, value, force_add=True)
        return
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, parent_key) if parent_key else tree
    if not OmegaConf.is_dict(parent) or name not in parent:
        raise ConfigError(f"~{key}: neither conf/ nor the recipe sets this key")
    del parent[name]


def _finish(tree: Any, groups: Mapping[str, str], system: str | None, typed: Sequence[Override]) -> None:
    """Set values that depend on other settings."""
    keys = {override.key for override in typed}
    tree.finetuning, tree.machine = groups.get("finetuning"), groups.get("machine")
    tree.recipe = groups.get("recipe")
    if system is not None:
        tree.system = system
    if is_null(tree.get("systems")) or tree.systems == {}:
        tree.systems = {"main": {}}
    decoding = None if is_null(tree.get("decoding")) else str(tree.decoding)
    tree.decode_folder = stage_folder("decode", None, "any", decoding).name
    if str(tree.exp).startswith("~"):
        tree.exp = str(expand_user(tree.exp))
    if "pretrained" in keys and not is_null(tree.pretrained) and "iterations" not in keys:
        tree.iterations = 0  # the given model replaces the model of the last iteration


def _load_settings(file: Path) -> Any:
    """Load the settings of a recipe or machine preset."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        settings = OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: invalid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(settings):
        raise ConfigError(f"{file}: expected settings, such as `kmeans: {{ n_clusters: 100 }}`")
    return settings


def preset_names(group: str) -> list[str]:
    """Return the names of the presets of a group in conf/."""
    return sorted(path.stem for path in (data_folder("conf") / group).glob("*.yaml"))


def _check_names(groups: Mapping[str, str]) -> None:
    """Raise ConfigError if a group in conf/ has no preset with the given name."""
    raise_config_errors([error for group, name in groups.items() for error in _name_errors(group, [name])])


def _name_errors(group: str, names: Iterable[str], where: str | None = None) -> list[str]:
    """Return an error message per name of which a group in conf/ has no preset.

    Args:
        where: setting that contains the names, if it is not that of the group.
    """
    known = preset_names(group)
    return [
        unknown_name_error(where or group, name, known, kind=group) for name in names if name not in known
    ]


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Raise ConfigError for unknown top-level keys, and if `systems` or `by_iteration` is not a mapping."""
    known = {*STAGES, *_GROUPS, *CommandSettings.__dataclass_fields__, "decode_folder"}
    known |= {
        "systems",
        "by_iteration",
        "model_size",
        "data",
        "seed",
        "vocabulary",
        "device",
        "workers",
        "engine",
        "hours",
    }
    options = tree["prepare"].get("options") if isinstance(tree["prepare"], Mapping) else None
    if isinstance(options, Mapping):  # recipes can expose options at the top level, e.g. subset=core
        known |= set(options)
    errors = [unknown_key_error(str(key), known, "") for key in tree if key not in known]
    for group in ("systems", "by_iteration"):
        if not is_null(tree.get(group)) and not isinstance(tree[group], Mapping):
            errors.append(f"{group}: expected a group of settings, found {quote(tree[group])}")
        elif group == "by_iteration" and not is_null(tree.get(group)):
            errors += _name_errors("iteration", map(str, tree[group]), where=group)
    raise_config_errors(errors)
