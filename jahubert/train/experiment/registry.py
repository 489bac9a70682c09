"""Registry of stages, feature extractors and training engines, and lookup of presets and recipes.

Settings may also refer to feature extractors and training engines by import path, as
"package.module:attribute" or "folder/file.py:attribute".
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jahubert
from jahubert.errors import ConfigError, quote
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


_FOLDERS: set[Path] = set()  # folders of the files that `_import_file` has imported
PER_DECODING = ("decode", "score")  # stages that can be run several times for one fine-tuned model


class Job(NamedTuple):
    """A stage with its validated settings and its output folder."""

    stage: str
    config: Any  # the stage's `Config`
    out: Path


def stage_folder(stage: str, iteration: int | None, system: str | None, decoding: str | None = None) -> Path:
    """Return the output folder of a stage, relative to the folder of the experiment.

    The name of an additional decoding of the same model is appended to the stage name, as in `decode-greedy`.
    """
    if iteration:
        return Path(f"iter{iteration}", stage)
    if system:
        return Path("systems", system, f"{stage}-{decoding}" if decoding and stage in PER_DECODING else stage)
    return Path(stage)


def decoding_of(folder: Path) -> str | None:
    """Return the decoding in the name of a stage folder (see `stage_folder`), or None for the default one."""
    return folder.name.partition("-")[2] or None


def stage_of(path: Path) -> str | None:
    """Return the stage whose folder is `path` or its parent, according to the folder names, or None."""
    names = (folder.name.partition("-")[0] for folder in (path, path.parent))
    return next((name for name in names if name in STAGES), None)


def data_folder(kind: str) -> Path:
    """Return the path of `conf` or `recipes`: next to the package in a checkout, inside it in a wheel."""
    package = Path(jahubert.__file__).parent
    checkout = package.parent / kind
    return checkout if (package.parent / "conf" / "config.yaml").exists() else package / f"_{kind}"


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))


def recipe_folder(recipe: str) -> Path:
    """Return the folder of a recipe.

    Args:
        recipe: the name of a folder in recipes/, or a path.

    Raises:
        ConfigError: the recipe does not exist.
    """
    for folder in (data_folder("recipes") / recipe, expand_user(recipe)):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise ConfigError(
        unknown_name_error("recipe", recipe, recipe_names()) + " (or use a folder with a recipe.yaml)"
    )


def resolve(name: str, table: dict[str, str], what: str) -> Any:
    """Import the object to which `name`, a key of `table` or an import path, refers.

    Args:
        what: name of the setting that `name` comes from, for error messages.

    Raises:
        ConfigError: `name` is neither a key of `table` nor an import path, or the module, file or attribute
            does not exist.
    """
    target = table.get(name, name)
    module_name, _, attribute = target.partition(":")
    if target is name and not attribute:
        raise ConfigError(
            unknown_name_error(what, name, table) + " (or use module:attribute or file.py:attribute)"
        )
    module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name, what)
    return _attribute(module, attribute, f"{what}: {module_name}") if attribute else module


def source_file(setting: Any) -> Path | None:
    """Return the file in a setting of the form "file.py:attribute" if it exists, otherwise None."""
    name, colon, _ = setting.partition(":") if isinstance(setting, str) else ("", "", "")
    return Path(name) if colon and name.endswith(".py") and Path(name).is_file() else None


def _attribute(module: ModuleType, name: str, what: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{what} has no {quote(name)}") from None


def _import(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ConfigError(f"{what}: module {name} not found") from None
        raise


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    digest = hashlib.sha256(os.fsencode(str(path.resolve()))).hexdigest()  # file names may not be unique
    name = f"jahubert_file_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=None)
    assert spec is not None and spec.loader is not None  # this holds for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `dataclass` looks up the module of a class by name
    folder = path.resolve().parent
    _forget_other_folders(folder)
    sys.path.insert(0, str(folder))  # a recipe may import files in its folder
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(folder))
    return module


def _forget_other_folders(folder: Path) -> None:
    """Remove modules of other folders from `sys.modules` if a file in `folder` has the same name."""
    _FOLDERS.add(folder)
    for file in folder.glob("*.py"):
        origin = getattr(sys.modules.get(file.stem), "__file__", None)
        if origin and Path(origin).resolve().parent in _FOLDERS - {folder}:
            del sys.modules[file.stem]


def value_for_subset(value: Any, subset: Any) -> Any:
    """Return the value for a subset if `value` maps subsets (or `other`) to values, otherwise `value`."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    return value.get(str(subset), value.get("other"))


def recipe_module(recipe: str, name: str = "prepare") -> ModuleType:
    """Import a Python file in the folder of a recipe.

    Args:
        recipe: see `recipe_folder`.
        name: the name of the file without `.py`.

    Raises:
        ConfigError: the recipe or the file does not exist.
    """
    file = recipe_folder(recipe) / f"{name}.py"
    if not file.is_file():
        raise ConfigError(f"recipe {recipe}: {file} not found; see docs/recipes.md")
    return _import_file(file)


def recipe_reader(recipe: str, what: str) -> Any:
    """Import `prepare` or `Config` from the corpus reader of a recipe, its prepare.py.

    Raises:
        ConfigError: the recipe does not exist, or has no prepare.py that defines `what`.
    """
    return _attribute(recipe_module(recipe), what, f"recipe {recipe}: prepare.py")


def generates_corpus(recipe: str) -> bool:
    """Return whether a recipe generates its corpus, that is, whether `prepare` declares `data: None`."""
    parameters = inspect.signature(recipe_reader(recipe, "prepare")).parameters
    return next(iter(parameters.values())).annotation in (None, "None")


def preset_file(preset: Any, subset: Any = None) -> Path | None:
    """Return the path of a fine-tuning preset in conf/finetuning, or None if there is none for the subset.

    Args:
        preset: the name of a preset, or a mapping from corpus subsets to names.

    Raises:
        ConfigError: the preset does not exist.
    """
    name = value_for_subset(preset, subset)
    files = {path.stem: path for path in data_folder("conf").glob("finetuning/*.yaml")}
    if name is not None and str(name) not in files:
        raise ConfigError(unknown_name_error("finetuning", str(name), sorted(files), kind="preset"))
    return files.get(str(name))
