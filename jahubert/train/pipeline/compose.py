"""The tree of settings of a command line, from the files of conf/, a recipe and a machine.

What a stage sees is composed in this order, later wins: the defaults of its dataclass, conf/config.yaml, the
groups (model=, iteration=), the fine-tuning preset of the recipe (conf/finetuning), its recipe.yaml, the
preset of the command line (finetuning=), the recipe's blocks for this iteration and this system, the file of
machine= in the same way, and the rest of the command line. Only this file and `run` import Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, MissingExtraError

FILES = ("model", "iteration", "machine")  # of conf/, by their names
GROUPS = ("recipe", "model", "iteration", "finetuning", "machine")
SELECTORS = ("stage", "system", "decoding", "decode_folder")


def compose(overrides: Sequence[str], system: str | None = None) -> dict[str, Any]:
    """The whole tree of settings as plain values."""
    try:
        from hydra import compose as hydra_compose
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise MissingExtraError("hydra-core", "train") from error
    from jahubert.train.experiment.registry import data_folder, recipe_folder, stage_folder

    parsed = [_parsed(override) for override in overrides]
    values = {p.key_or_group: p.value() for p in parsed}
    recipe = values.get("recipe")
    groups = {name: values[name] for name in FILES if values.get(name) is not None}
    _check_groups(groups)
    machine = groups.pop("machine", None)
    presets = [{} if recipe is None else _blocks(recipe_folder(str(recipe)) / "recipe.yaml")]
    presets += [_blocks(data_folder("conf") / "machine" / f"{machine}.yaml")] if machine else []
    sizes = [preset["model_size"] for preset in presets if "model_size" in preset]
    groups.setdefault("model", (sizes or ["base"])[-1])
    _check_groups(groups)
    try:
        wanted = [f"{name}='{value}'" for name, value in groups.items()]  # quoted: a name may be a number
        tree: Any
        if GlobalHydra.instance().is_initialized():  # inside Hydra's own main
            tree = hydra_compose("config", overrides=wanted)
        else:
            with initialize_config_dir(str(data_folder("conf").resolve()), version_base="1.3"):
                tree = hydra_compose("config", overrides=wanted)
        OmegaConf.set_struct(tree, False)
        tree = _merged(tree, values, presets, system)
        for override in parsed:
            if override.key_or_group not in FILES[:2]:
                OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        if "name" not in values and recipe is not None:
            tree.name = Path(str(recipe)).name  # a recipe may be given as a folder
        tree.finetuning = values.get("finetuning")
        tree.recipe, tree.system = recipe, tree.system if system is None else system
        tree.systems = tree.get("systems") or {"main": {}}
        tree.decoding = None if tree.decoding is None else str(tree.decoding)
        tree.decode_folder = stage_folder("decode", None, "any", tree.decoding).name
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    _check_top(plain)
    return plain


def _merged(tree: Any, values: dict[str, Any], presets: list[Any], system: str | None) -> Any:
    """The tree under the presets for fine-tuning, the recipe and, where one is asked for, the machine."""
    from omegaconf import OmegaConf

    from jahubert.train.experiment.registry import preset_file

    recipe = presets[0]
    subset = values.get("subset", recipe.get("subset"))
    files = preset_file(recipe.get("finetuning"), subset), preset_file(values.get("finetuning"))
    own, asked = ({"finetune": OmegaConf.load(file)} if file else {} for file in files)
    tree = OmegaConf.merge(tree, own)
    for preset in presets:
        iteration_block = (preset.get("by_iteration") or {}).get(int(tree.iteration)) or {}
        system_block = (preset.get("systems") or {}).get(system or "") or {}
        tree = OmegaConf.merge(tree, preset, asked if preset is recipe else {}, iteration_block, system_block)
    return tree


def _parsed(override: str) -> Any:
    """Hydra's view of `key=value`; a value outside its grammar (a path in Japanese) is taken as it stands."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise ConfigError(f"{override}: not a setting; write key=value")
    try:
        parsed = parser.parse_override(override)
    except HydraException as error:
        if value[:1] in ("", "'", '"', "[", "{"):
            raise ConfigError(f"{override}: cannot be read ({' '.join(str(error).split())})") from error
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        try:
            parsed = parser.parse_override(f"{key}='{quoted}'")
        except HydraException as again:
            raise ConfigError(f"{override}: {key!r} is not the name of a setting") from again
    if parsed.is_sweep_override():
        raise ConfigError(f"{override}: several values need --multirun; give one")
    return parsed


def _blocks(file: Path) -> Any:
    """The settings of a recipe or a machine."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        blocks = OmegaConf.load(file)
    except YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(blocks):
        raise ConfigError(f"{file}: must hold settings, such as `kmeans: {{ n_clusters: 100 }}`")
    return blocks


def _check_groups(groups: dict[str, Any]) -> None:
    """Refuse a model size, an iteration or a machine that has no file in conf/."""
    from jahubert.train.experiment.config import unknown_name_error
    from jahubert.train.experiment.registry import data_folder

    for name, value in groups.items():
        known = sorted(path.stem for path in (data_folder("conf") / name).glob("*.yaml"))
        if str(value) not in known:
            raise ConfigError(unknown_name_error(name, str(value), known))


def _check_top(tree: dict[str, Any]) -> None:
    """Refuse names that no part of the tree reads."""
    from jahubert.train.experiment.config import unknown_key_error
    from jahubert.train.experiment.registry import STAGES

    known = {*STAGES, *GROUPS, *SELECTORS, "iterations", "systems", "by_iteration", "model_size"}
    known |= {"name", "exp", "data", "seed", "pretrained", "vocabulary", "hydra"}
    known |= {"device", "workers", "processes", "machines", "engine", "hours", "hang_timeout_minutes"}
    options = tree["prepare"].get("options") if isinstance(tree["prepare"], dict) else None
    known |= set(options if isinstance(options, dict) else ())  # a recipe may lift one up: subset=core
    wrong = [unknown_key_error(key, known, "") for key in tree if key not in known]
    if wrong:
        raise ConfigError("; ".join(wrong))
