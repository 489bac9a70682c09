"""Registry of stages, feature extractors and engines, and the paths of presets and recipes.

Settings may also name an object as "package.module:attribute" or "folder/file.py:attribute".
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jahubert
from jahubert.errors import ConfigError
from jahubert.train.experiment.config import expand_user, unknown_name_error

FEATURES = {
    "mfcc": "jahubert.train.clustering.features:Mfcc",
    "hubert": "jahubert.train.clustering.features:HubertLayer",
}
ENGINES = {
    "torch": "jahubert.train.trainer.trainer:train",
    "fairseq2": "jahubert.train.trainer.fairseq2:train",
}
STAGES = {
    name: f"jahubert.train.stages.{name}"
    for name in (
        "prepare",
        "features",
        "kmeans",
        "label",
        "pretrain",
        "targets",
        "finetune",
        "decode",
        "score",
        "report",
    )
}


DECODED = ("decode", "score")  # stages that may run several times on one fine-tuned model


def stage_folder(stage: str, iteration: int | None, system: str | None, decoding: str | None = None) -> Path:
    """Output folder of a stage, relative to the folder of the experiment.

    The name of a further decoding of the same model is appended to that of the stage: decode-greedy.
    """
    if iteration:
        return Path(f"iter{iteration}", stage)
    if system:
        return Path("systems", system, f"{stage}-{decoding}" if decoding and stage in DECODED else stage)
    return Path(stage)


def decoding_of(folder: Path) -> str | None:
    """The name of the decoding in a folder name from `stage_folder`; None for the default decoding."""
    return folder.name.partition("-")[2] or None


def stage_of(path: Path) -> str | None:
    """The stage that writes a file or folder of this name, or None."""
    names = (folder.name.partition("-")[0] for folder in (path, path.parent))
    return next((name for name in names if name in STAGES), None)


def data_folder(kind: str) -> Path:
    """The folder `conf` or `recipes`: next to the package in a checkout, inside it in a wheel."""
    package = Path(jahubert.__file__).parent
    checkout = package.parent / kind
    return checkout if (package.parent / "conf" / "config.yaml").exists() else package / f"_{kind}"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))


def recipe_folder(recipe: str) -> Path:
    """The folder of a recipe, given by its name under recipes/ or by a path.

    Raises:
        ConfigError: no such recipe.
    """
    for folder in (data_folder("recipes") / recipe, expand_user(recipe)):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise ConfigError(
        unknown_name_error("recipe", recipe, recipe_names()) + " (or give a folder with a recipe.yaml)"
    )


def resolve(name: str, table: dict[str, str], what: str) -> Any:
    """The object that `name` refers to: an entry of the table, or an import path.

    Args:
        what: the kind of object, for error messages.

    Raises:
        ConfigError: no such entry, module, file or attribute.
    """
    target = table.get(name, name)
    module_name, _, attribute = target.partition(":")
    if target is name and not attribute:
        raise ConfigError(
            unknown_name_error(what, name, table) + " (or give module:attribute or file.py:attribute)"
        )
    module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name, what)
    try:
        return getattr(module, attribute) if attribute else module
    except AttributeError:
        raise ConfigError(f"{what}: {module_name} has no {attribute!r}") from None


def _import(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ConfigError(f"{what}: module {name} not found") from None
        raise


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    digest = hashlib.sha256(os.fsencode(str(path.resolve()))).hexdigest()  # file names may repeat
    name = f"jahubert_file_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=None)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    sys.path.insert(0, str(path.resolve().parent))  # a recipe may import files next to it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def by_subset(value: Any, subset: Any) -> Any:
    """A recipe's setting for a subset: a single value, or an entry of a mapping (`other` is the fallback)."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    return value.get(str(subset), value.get("other"))


def recipe_reader(recipe: str, what: str) -> Any:
    """`prepare` or `Config` from a recipe's prepare.py, which reads its corpus.

    Raises:
        ConfigError: no such recipe, or it has no prepare.py.
    """
    file = recipe_folder(recipe) / "prepare.py"
    if not file.is_file():
        raise ConfigError(
            f"recipe {recipe}: {file} not found, which should read the corpus; see docs/recipes.md"
        )
    return resolve(f"{file}:{what}", {}, "recipe")


def preset_file(preset: Any, subset: Any = None) -> Path | None:
    """The file of a fine-tuning preset in conf/finetuning, or None.

    Args:
        preset: the preset's name, or a mapping from subsets of the corpus to names.

    Raises:
        ConfigError: no such preset.
    """
    name = by_subset(preset, subset)
    files = {path.stem: path for path in data_folder("conf").glob("finetuning/*.yaml")}
    if name is not None and str(name) not in files:
        raise ConfigError(unknown_name_error("finetuning", str(name), sorted(files)))
    return files.get(str(name))
