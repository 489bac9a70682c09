"""From a name in a configuration to an object: three tables to grep, and a door to the outside.

Every table also takes "package.module:attribute" and "folder/file.py:attribute".
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
    """Where a stage writes, below the folder of the experiment.

    A second decoding of the same model has a name, which stands behind that of its stages: decode-greedy.
    """
    if iteration:
        return Path(f"iter{iteration}", stage)
    if system:
        return Path("systems", system, f"{stage}-{decoding}" if decoding and stage in DECODED else stage)
    return Path(stage)


def decoding_of(folder: Path) -> str | None:
    """The name of the decoding whose stage wrote a folder, as `stage_folder` made it; None: the plain one."""
    return folder.name.partition("-")[2] or None


def stage_of(path: Path) -> str | None:
    """The stage that makes a file or folder of this name, if one does."""
    names = (folder.name.partition("-")[0] for folder in (path, path.parent))
    return next((name for name in names if name in STAGES), None)


def data_folder(kind: str) -> Path:
    """Where `conf` or `recipes` stand: beside the package in a checkout, inside it in a wheel."""
    package = Path(jahubert.__file__).parent
    checkout = package.parent / kind
    return checkout if (package.parent / "conf" / "config.yaml").exists() else package / f"_{kind}"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))


def recipe_folder(recipe: str) -> Path:
    """The folder of a recipe: a name under recipes/, or a path to one's own.

    Raises:
        ConfigError: no such recipe.
    """
    for folder in (data_folder("recipes") / recipe, expand_user(recipe)):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise ConfigError(
        unknown_name_error("recipe", recipe, recipe_names()) + " (or give a folder that holds a recipe.yaml)"
    )


def resolve(name: str, table: dict[str, str], what: str) -> Any:
    """The object called `name`: an entry of the table, or an import path.

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
            raise ConfigError(f"{what}: there is no module {name}") from None
        raise


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    place = str(path.resolve())  # two folders of one name are two recipes
    name = f"jahubert_file_{path.stem}_{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=None)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))  # a recipe may lie in several files
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def by_subset(value: Any, subset: Any) -> Any:
    """What a recipe says of a subset of its corpus: one value for all, or values by subset, and `other`."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    return value.get(str(subset), value.get("other"))


def recipe_reader(recipe: str, what: str) -> Any:
    """`prepare` or `Config` of the recipe's prepare.py, which reads its corpus.

    Raises:
        ConfigError: no such recipe, or it has no such file.
    """
    file = recipe_folder(recipe) / "prepare.py"
    if not file.is_file():
        raise ConfigError(f"recipe {recipe}: {file} is missing, which reads the corpus; see docs/recipes.md")
    return resolve(f"{file}:{what}", {}, "recipe")


def preset_file(named: Any, subset: Any = None) -> Path | None:
    """The file of a fine-tuning preset (conf/finetuning), or None.

    Args:
        named: its name; or names by subset of the corpus.

    Raises:
        ConfigError: no such preset.
    """
    named = by_subset(named, subset)
    files = {path.stem: path for path in data_folder("conf").glob("finetuning/*.yaml")}
    if named is not None and str(named) not in files:
        raise ConfigError(unknown_name_error("finetuning", str(named), sorted(files)))
    return files.get(str(named))
