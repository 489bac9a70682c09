"""The door to the stages.

    python -m jahubert.run recipe=NAME stage=STAGE [iteration=N] [system=NAME] [key=value ...]

`stage=all` runs what is not done yet, in order, over all iterations and systems. The only file that
imports Hydra. What a stage sees is composed in this order, later wins: the defaults of its dataclass,
conf/config.yaml, the groups (model=, iteration=), the recipe's recipe.yaml, its block for this iteration
and for this system, and the command line.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, DataError, JahubertError, MissingExtraError, UserError

log = logging.getLogger("jahubert")

GROUPS = ("recipe", "model", "iteration")
SELECTORS = ("stage", "system")
ITERATED = ("features", "kmeans", "label", "pretrain")
PER_SYSTEM = ("finetune", "decode", "score")
INTERRUPTED = 130  # exit status
# numpy says only how much it could write; a file is too large for a limit (ulimit -f).
_FULL = re.compile(r"No space left on device|quota exceeded|File too large|\d+ requested and \d+ written")
_LOST = re.compile(r"gloo/transport|Connection (reset|closed|refused)|Broken pipe|remote process exited")
_NO_ROOM = 1 << 20  # bytes free: whatever failed, failed for want of room


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the overrides ask for; returns the exit status (2: a user's mistake)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        n = _processes(argv)
        if n > 1 and "WORLD_SIZE" not in os.environ:
            from jahubert.train import ranks

            return ranks.launch([sys.executable, "-m", "jahubert.run", *argv], n)
        if any(arg.startswith("-") for arg in argv):
            _hydra_main(argv)
        else:
            run(argv)
    except JahubertError as error:
        stopped = str(error).startswith("told to stop by")  # all processes at once
        if not getattr(error, "told", stopped and not first):
            print(f"jahubert: error: {error}", file=sys.stderr)
        return INTERRUPTED if stopped and "SIGINT" in str(error) else error.exit_status
    except OSError as error:
        if error.filename is None:
            raise
        print(f"jahubert: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.exit_status
    except RuntimeError as error:  # gloo and NCCL raise nothing more particular
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not _LOST.search(str(error)):
            raise
        print(
            "jahubert: another process of this run ended, so this one ends; see its message", file=sys.stderr
        )
        return UserError.exit_status
    except KeyboardInterrupt:
        print("jahubert: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(overrides: Sequence[str]) -> None:
    """Run the stages that a list of overrides asks for.

    Raises:
        ConfigError: an override that Hydra cannot read, an unknown stage, recipe, system or key.
    """
    from jahubert.train import ranks

    try:
        jobs = [configured(*job, overrides) for job in plan(compose(overrides))]
        mistakes = list(dict.fromkeys(str(job) for job in jobs if isinstance(job, ConfigError)))
        if mistakes:
            raise ConfigError("\n".join(mistakes))
    except JahubertError as error:
        error.told = os.environ.get("RANK", "0") != "0"  # type: ignore[attr-defined]  # all find the same
        raise
    with ranks.process_group():
        for job in jobs:
            run_stage(*job)  # type: ignore[misc]


def configured(
    stage: str, iteration: int | None, system: str | None, overrides: Sequence[str]
) -> tuple[str, Any, Path] | ConfigError:
    """(stage, its config, its folder), or what is wrong with it: all stages are checked before one runs."""
    from jahubert.train.config import structure
    from jahubert.train.lookup import STAGES, resolve

    tree = compose([*overrides, *([f"++iteration={iteration}"] if iteration else [])], system)
    out = Path(tree["exp"])
    if iteration:
        out /= f"iter{iteration}"
    elif system:
        out = out / "systems" / system
    try:
        config = structure(tree[stage] or {}, resolve(stage, STAGES, "stage").Config, stage)
        if stage == "features":
            _check_layer(tree)
    except ConfigError as error:
        return error
    return stage, config, out / stage


def _check_layer(tree: dict[str, Any]) -> None:
    """Before anything runs: the model that an earlier iteration will make has the layer that is asked for."""
    from jahubert.hubert import HubertConfig

    features, layers = tree["features"], (tree["model"] or {}).get("layers", HubertConfig().layers)
    own = Path(tree["exp"]) / f"iter{tree['iteration'] - 1}" / "pretrain" / "bundle"
    layer = features.get("layer")
    if features.get("model") and Path(features["model"]) == own and isinstance(layer, int) and layer > layers:
        raise ConfigError(
            f"features.layer: iteration {tree['iteration']} takes layer {layer}, but the model has {layers}; "
            f"set it in by_iteration or on the command line"
        )


def plan(tree: dict[str, Any]) -> list[tuple[str, int | None, str | None]]:
    """(stage, iteration, system) of everything that is asked for, in order."""
    from jahubert.train.lookup import STAGES

    if tree["recipe"] is None:
        raise ConfigError(
            "recipe=... is missing; choose one of " + ", ".join(_recipes()) + ", or give a folder"
        )
    asked, systems, iterations = tree["stage"], list(tree["systems"]), tree["iterations"]
    if not isinstance(iterations, int) or iterations < 0:
        raise ConfigError(f"iterations={iterations}: give the number of iterations of pretraining")
    if asked != "all" and asked not in STAGES:
        from jahubert.train.config import unknown

        raise ConfigError(unknown("stage", str(asked), [*STAGES, "all"], missing=asked is None))
    if tree["system"] is not None and tree["system"] not in systems:
        from jahubert.train.config import unknown

        raise ConfigError(unknown("system", str(tree["system"]), systems))
    chosen = [tree["system"]] if tree["system"] else systems
    if asked in ITERATED:
        return [(asked, int(tree["iteration"]), None)]
    if asked in PER_SYSTEM:
        return [(asked, None, system) for system in chosen]
    if asked != "all":
        return [(asked, None, None)]
    order: list[tuple[str, int | None, str | None]] = [("prepare", None, None)]
    order += [(stage, iteration, None) for iteration in range(1, iterations + 1) for stage in ITERATED]
    if iterations:  # the last model's own units: for `jahubert units`, and to see what it knows of phones
        order += [(stage, iterations + 1, None) for stage in ITERATED if stage != "pretrain"]
    order += [("targets", None, None)]
    order += [(stage, None, system) for system in chosen for stage in PER_SYSTEM]
    return [*order, ("report", None, None)]


def run_stage(stage: str, config: Any, out: Path) -> dict[str, Any]:
    """Run one stage in its folder, or keep what is there."""
    from jahubert.train import provenance, ranks
    from jahubert.train.lookup import STAGES, resolve

    module = resolve(stage, STAGES, "stage")
    keep, first = getattr(module, "KEEP", True), ranks.rank() == 0

    def begin() -> tuple[dict[str, Any], bool]:
        recipe = provenance.recipe_of(stage, module.VERSION, config)
        out.mkdir(parents=True, exist_ok=True)
        return recipe, keep and provenance.begin(out, recipe)

    with full_disk_said(out):
        recipe, there = ranks.from_first(begin)
    if there:
        log.info("%s: done before, kept", out)
        return provenance.read_record(out / provenance.DONE)["metrics"]
    log.info("%s ...", out)
    started = time.monotonic()
    try:
        with full_disk_said(out):
            metrics = module.run(config, out)
            if first and keep:
                provenance.finish(out, recipe, metrics, time.monotonic() - started)
    except BaseException:
        if first:
            provenance.release(out)
        raise
    ranks.barrier()
    log.info("%s: done in %.1f s  %s", out, time.monotonic() - started, _shown(metrics))
    return metrics


@contextmanager
def full_disk_said(out: Path) -> Iterator[None]:
    """Say in a sentence that the disk of `out` is full, whichever library noticed, and in its own words."""
    try:
        yield
    except (JahubertError, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not _is_full(error, out):
            raise
        raise DataError(
            f"the disk is full, or a quota or limit reached, while writing into {out}: make room and run the "
            "same command again; what was finished is kept"
        ) from error


def _is_full(error: BaseException | None, out: Path) -> bool:
    """Whether the error, or one that it came from, speaks of a full disk, or there is no room left at all."""
    while error is not None:
        if _FULL.search(str(error)):
            return True
        for failure, _ in getattr(error, "failures", {}).values():  # of the processes that saved a checkpoint
            if _is_full(failure, out):
                return True
        error = error.__cause__ or error.__context__
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free < _NO_ROOM


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
    from jahubert.train.lookup import home

    parsed = [_parsed(override) for override in overrides]
    values = {p.key_or_group: p.value() for p in parsed}
    recipe = values.get("recipe")
    blocks = {} if recipe is None else _recipe_blocks(str(recipe))
    groups = {name: values[name] for name in ("model", "iteration") if name in values}
    groups.setdefault("model", blocks.get("model_size", "base"))
    _check_groups(groups)
    try:
        wanted = [f"{name}='{value}'" for name, value in groups.items()]  # quoted: a name may be a number
        tree: Any
        if GlobalHydra.instance().is_initialized():  # inside Hydra's own main
            tree = hydra_compose("config", overrides=wanted)
        else:
            with initialize_config_dir(str(home("conf").resolve()), version_base="1.3"):
                tree = hydra_compose("config", overrides=wanted)
        OmegaConf.set_struct(tree, False)
        tree = OmegaConf.merge(tree, blocks)
        iteration_block = (blocks.get("by_iteration") or {}).get(int(tree.iteration)) or {}
        system_block = (blocks.get("systems") or {}).get(system or "") or {}
        tree = OmegaConf.merge(tree, iteration_block, system_block)
        for override in parsed:
            if override.key_or_group not in ("model", "iteration"):
                OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        if "name" not in values and recipe is not None:
            tree.name = Path(str(recipe)).name  # a recipe may be given as a folder
        tree.recipe, tree.system = recipe, tree.system if system is None else system
        tree.systems = tree.get("systems") or {"main": {}}
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    _check_top(plain)
    return plain


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


def _recipe_blocks(recipe: str) -> Any:
    """The settings of a recipe."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from jahubert.train.lookup import recipe_folder

    file = recipe_folder(recipe) / "recipe.yaml"
    try:
        blocks = OmegaConf.load(file)
    except YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(blocks):
        raise ConfigError(f"{file}: must hold settings, such as `kmeans: {{ n_clusters: 100 }}`")
    return blocks


def _check_groups(groups: dict[str, Any]) -> None:
    """Refuse a model size or an iteration that has no file in conf/."""
    from jahubert.train.config import unknown
    from jahubert.train.lookup import home

    for name, value in groups.items():
        known = sorted(path.stem for path in (home("conf") / name).glob("*.yaml"))
        if str(value) not in known:
            raise ConfigError(unknown(name, str(value), known))


def _check_top(tree: dict[str, Any]) -> None:
    """Refuse names that no part of the tree reads."""
    from jahubert.train.config import unknown_key
    from jahubert.train.lookup import STAGES

    known = {*STAGES, *GROUPS, *SELECTORS, "iterations", "systems", "by_iteration", "model_size"}
    known |= {"name", "exp", "data", "seed", "pretrained", "hydra"}
    known |= {"device", "workers", "processes", "engine"}
    options = tree["prepare"].get("options") if isinstance(tree["prepare"], dict) else None
    known |= set(options if isinstance(options, dict) else ())  # a recipe may lift one up: subset=core
    wrong = [unknown_key(key, known, "") for key in tree if key not in known]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _processes(argv: Sequence[str]) -> int:
    given = [arg.partition("=")[2] for arg in argv if arg.lstrip("+").startswith("processes=")]
    if given and not (given[-1].isdigit() and int(given[-1])):
        raise ConfigError(f"processes={given[-1]}: give the number of processes on this machine")
    return int(given[-1]) if given else 1


def _recipes() -> list[str]:
    from jahubert.train.lookup import home

    return sorted(path.parent.name for path in home("recipes").glob("*/recipe.yaml"))


def _hydra_main(argv: list[str]) -> None:
    """Hydra's own command line, for its flags: --multirun, launchers, --info."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from jahubert.train.lookup import home

    sys.argv = [sys.argv[0], *(arg if arg.startswith(("-", "hydra")) else _lenient(arg) for arg in argv)]

    @hydra.main(config_path=str(home("conf").resolve()), config_name="config", version_base="1.3")
    def door(_: Any) -> None:
        run([arg.removeprefix("++") for arg in HydraConfig.get().overrides.task])

    door()


def _lenient(override: str) -> str:
    """Let Hydra accept keys that it does not know: our own check names the nearest right one."""
    key = override.split("=")[0]
    return override if key in ("model", "iteration") or override.startswith(("+", "~")) else f"++{override}"


def _shown(metrics: dict[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


if __name__ == "__main__":
    sys.exit(main())
