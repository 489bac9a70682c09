"""The door to the stages.

    python -m jahubert.run recipe=NAME stage=STAGE [iteration=N] [system=NAME] [key=value ...]

`stage=all` runs what is not done yet, in order, over all iterations and systems. The only file that
imports Hydra. What a stage sees is composed in this order, later wins: the defaults of its dataclass,
conf/config.yaml, the groups (model=, iteration=), the recipe's recipe.yaml, its block for this iteration
and for this system, and the command line.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, JahubertError, MissingExtraError

log = logging.getLogger("jahubert")

GROUPS = ("recipe", "model", "iteration")
SELECTORS = ("stage", "system")
ITERATED = ("features", "kmeans", "label", "pretrain")
PER_SYSTEM = ("finetune", "decode", "score")


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
        if not getattr(error, "told", False):
            print(f"jahubert: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"jahubert: error: the disk is full{where}; free some space and run the same command again: "
            "what was finished is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("jahubert: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def run(overrides: Sequence[str]) -> None:
    """Run the stages that a list of overrides asks for.

    Raises:
        ConfigError: an override that Hydra cannot read, an unknown stage, recipe, system or key.
    """
    from jahubert.train import ranks

    jobs = [configured(*job, overrides) for job in plan(compose(overrides))]
    mistakes = list(dict.fromkeys(str(job) for job in jobs if isinstance(job, ConfigError)))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
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
    except ConfigError as error:
        return error
    return stage, config, out / stage


def plan(tree: dict[str, Any]) -> list[tuple[str, int | None, str | None]]:
    """(stage, iteration, system) of everything that is asked for, in order."""
    from jahubert.train.lookup import STAGES

    if tree["recipe"] is None:
        raise ConfigError(
            "recipe=... is missing; choose one of " + ", ".join(_recipes()) + ", or give a folder"
        )
    asked, systems = tree["stage"], list(tree["systems"])
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
    order += [
        (stage, iteration, None) for iteration in range(1, tree["iterations"] + 1) for stage in ITERATED
    ]
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

    recipe, there = ranks.from_first(begin)
    if there:
        log.info("%s: done before, kept", out)
        return provenance.read_record(out / provenance.DONE)["metrics"]
    log.info("%s ...", out)
    started = time.monotonic()
    metrics = module.run(config, out)
    if first and keep:
        provenance.finish(out, recipe, metrics, time.monotonic() - started)
    ranks.barrier()
    log.info("%s: done in %.1f s  %s", out, time.monotonic() - started, _shown(metrics))
    return metrics


def compose(overrides: Sequence[str], system: str | None = None) -> dict[str, Any]:
    """The whole tree of settings as plain values."""
    try:
        from hydra import compose as hydra_compose
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise MissingExtraError("hydra-core", "train") from error
    from jahubert.train.lookup import home, recipe_folder

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = {p.key_or_group: p.value() for p in parsed}
        recipe = values.get("recipe")
        blocks: Any = OmegaConf.create({})
        if recipe is not None:
            blocks = OmegaConf.load(recipe_folder(str(recipe)) / "recipe.yaml")
        groups = {name: values[name] for name in ("model", "iteration") if name in values}
        groups.setdefault("model", blocks.get("model_size", "base"))
        wanted = [f"{name}='{value}'" for name, value in groups.items()]  # quoted: a name may be a number
        tree: Any
        if GlobalHydra.instance().is_initialized():  # inside Hydra's own main
            tree = hydra_compose("config", overrides=wanted)
        else:
            with initialize_config_dir(str(home("conf").resolve()), version_base="1.3"):
                tree = hydra_compose("config", overrides=wanted)
        OmegaConf.set_struct(tree, False)
        tree = OmegaConf.merge(tree, blocks)
        iteration_block = blocks.get("by_iteration", {}).get(int(tree.iteration), {})
        system_block = blocks.get("systems", {}).get(system, {}) if system else {}
        tree = OmegaConf.merge(tree, iteration_block, system_block or {})
        for override in parsed:
            if override.key_or_group not in ("model", "iteration"):
                OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        if "name" not in values and recipe is not None:
            tree.name = Path(str(recipe)).name  # a recipe may be given as a folder
        tree.recipe, tree.system = recipe, tree.system if system is None else system
        tree.setdefault("systems", {"main": {}})
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    _check_top(plain)
    return plain


def _check_top(tree: dict[str, Any]) -> None:
    """Refuse names that no part of the tree reads."""
    from jahubert.train.config import unknown_key
    from jahubert.train.lookup import STAGES

    known = {*STAGES, *GROUPS, *SELECTORS, "iterations", "systems", "by_iteration", "model_size"}
    known |= {
        "name",
        "exp",
        "data",
        "seed",
        "device",
        "workers",
        "processes",
        "engine",
        "pretrained",
        "hydra",
    }
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
