"""The door to the stages.

    python -m jahubert.run recipe=NAME stage=STAGE [iteration=N] [system=NAME] [decoding=NAME] [key=value ...]

`stage=all` runs what is not done yet, in order, over all iterations and systems.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, JahubertError, MissingExtraError, Stopped, UserError
from jahubert.train.pipeline.compose import compose

log = logging.getLogger("jahubert")

ITERATED = ("features", "kmeans", "label", "pretrain")
PER_SYSTEM = ("finetune", "decode", "score")
INTERRUPTED = 130  # exit status
_LOST = re.compile(r"gloo/transport|Connection (reset|closed|refused)|Broken pipe|remote process exited")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the overrides ask for; returns the exit status (2: a user's mistake)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    join_slurm(os.environ)
    with _listening():
        try:
            _speak(logging.INFO if _first() else logging.WARNING)
            if any(arg.startswith("-") for arg in argv):
                _hydra_main(argv)
            else:
                return start(argv)
        except (Exception, KeyboardInterrupt, _Told) as error:
            return tell(error)
    return 0


class _Told(BaseException):
    """To stop, by a signal outside of training: no `except Exception` is to keep it."""


_told: list[str] = []  # the signal, once it came: what it breaks off may fail in another way, or swallow it


@contextmanager
def _listening() -> Iterator[None]:
    """A signal to stop ends the work as Ctrl-C does; a training has handlers of its own, and saves."""
    own, before = os.getpid(), {}

    def stop(number: int, _: Any) -> None:
        if os.getpid() != own:  # forked: the one that it works for says what there is to say
            os._exit(Stopped.exit_status)
        if not _told:  # launchers and schedulers may both send it
            _told.append(signal.Signals(number).name)
            raise _Told

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _told else handler)
        _told.clear()


def _unless_told() -> None:
    """Before something long begins."""
    if _told:
        raise _Told


def tell(error: BaseException) -> int:
    """Say on standard error what ended the run, unless another process does; gives the exit status."""
    status, said = 1, ""
    reported = isinstance(error, JahubertError) and error.reported
    if _told:
        status = Stopped.exit_status
        said = f"told to stop by {_told[0]}: what was finished is kept; the same command continues"
    elif isinstance(error, JahubertError):
        status, said = error.exit_status, f"error: {error}"
        if isinstance(error, Stopped) and "SIGINT" in str(error):
            status = INTERRUPTED
    elif isinstance(error, OSError) and error.filename is not None:
        status, said = UserError.exit_status, f"error: {error.filename}: {error.strerror}"
    elif isinstance(error, RuntimeError) and _several() and _LOST.search(str(error)):
        # gloo and NCCL raise nothing more particular. Status 1: the one that ended has the last word, and
        # launchers give the highest.
        said = "another process of this run ended, so this one ends; see what is said of that one"
    elif isinstance(error, KeyboardInterrupt):
        status, said = INTERRUPTED, "interrupted; the same command continues"
    if not said:
        traceback.print_exception(error)
    elif not (reported or ((_told or isinstance(error, Stopped)) and not _first())):
        print(f"jahubert: {said}", file=sys.stderr)
    return status


def _first() -> bool:
    """Of several processes, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _speak(level: int) -> None:
    """Log lines go to standard error, where a progress bar makes way for each."""
    try:
        from tqdm.contrib import DummyTqdmFile
    except ImportError as error:
        raise MissingExtraError("tqdm", "train") from error
    logging.basicConfig(level=level, format="%(message)s", stream=DummyTqdmFile(sys.stderr))


def start(overrides: Sequence[str]) -> int:
    """Run the stages here, or in as many processes as are asked for; the exit status."""
    n = _processes(overrides)
    _unless_told()
    if n > 1:
        from jahubert.train.experiment import distributed

        return distributed.launch([sys.executable, "-m", "jahubert.run", *overrides], n)
    run(overrides)
    return 0


def join_slurm(environment: MutableMapping[str, str]) -> None:
    """Where `srun` started several processes, say so in the variables that torch reads.

    Only of a step's own tasks: a job's script has SLURM_NTASKS as well, and is one process.
    """
    n = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if n == "1" or "WORLD_SIZE" in environment:
        return
    # node[017-020,031],other3 -> node017
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).partition(",")[0]
    environment["WORLD_SIZE"], environment["RANK"] = n, environment["SLURM_PROCID"]
    # With --gpus-per-task=1 a task sees its own GPU only, and that is its first one.
    own = re.fullmatch("[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    environment["LOCAL_RANK"] = "0" if own else environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first)
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def run(overrides: Sequence[str]) -> None:
    """Run the stages that a list of overrides asks for.

    Raises:
        ConfigError: an override that Hydra cannot read; an unknown stage, recipe, system or key; an input
            that is not there and that no stage of the command makes.
    """
    from jahubert.train.experiment import distributed
    from jahubert.train.pipeline import preflight
    from jahubert.train.trainer.watchdog import watchdog

    try:
        jobs = all_configured(overrides, starting=True)
        minutes = _hang_minutes(overrides)
    except JahubertError as error:
        error.reported = not _first()  # every process finds the same mistakes
        raise
    with distributed.process_group(tell), watchdog(minutes):
        for job in jobs:
            _unless_told()
            run_stage(*job)
            if job[0] == "prepare":
                preflight.check_splits(jobs)


def all_configured(overrides: Sequence[str], starting: bool = False) -> list[tuple[str, Any, Path]]:
    """(stage, its config, its folder) of everything that is asked for, in order.

    Args:
        starting: they are about to run here, so their inputs must be there or on the way.

    Raises:
        ConfigError: all that is wrong with any of them.
    """
    tree = compose(overrides)
    planned = plan(tree)
    found = [configured(*job, overrides) for job in planned]
    jobs = [job for job in found if not isinstance(job, ConfigError)]
    mistakes = [str(job) for job in found if isinstance(job, ConfigError)]
    if starting:
        from jahubert.train.pipeline import preflight

        made = [folder_of(tree, *job) for job in planned]
        mistakes += preflight.preflight_errors(jobs, made, int(os.environ.get("WORLD_SIZE", 1)))
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return jobs


def folder_of(tree: dict[str, Any], stage: str, iteration: int | None, system: str | None) -> Path:
    """The folder of a stage in the experiment of a tree of settings."""
    from jahubert.train.experiment.registry import stage_folder

    return Path(tree["exp"]) / stage_folder(stage, iteration, system, tree["decoding"])


def configured(
    stage: str, iteration: int | None, system: str | None, overrides: Sequence[str]
) -> tuple[str, Any, Path] | ConfigError:
    """(stage, its config, its folder), or what is wrong with it: all stages are checked before one runs."""
    from jahubert.train.experiment.config import structure
    from jahubert.train.experiment.registry import STAGES, resolve

    tree = compose([*overrides, *([f"++iteration={iteration}"] if iteration else [])], system)
    try:
        config = structure(tree[stage] or {}, resolve(stage, STAGES, "stage").Config, stage)
        if stage == "features":
            _check_layer(tree)
    except ConfigError as error:
        return error
    return stage, config, folder_of(tree, stage, iteration, system)


def _check_layer(tree: dict[str, Any]) -> None:
    """Before anything runs: the model that an earlier iteration will make has the layer that is asked for."""
    from jahubert.model.hubert import HubertConfig

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
    from jahubert.train.experiment.registry import STAGES

    if tree["recipe"] is None:
        raise ConfigError(
            "recipe=... is missing; choose one of " + ", ".join(_recipes()) + ", or give a folder"
        )
    asked, systems, iterations = tree["stage"], list(tree["systems"]), tree["iterations"]
    if not isinstance(iterations, int) or iterations < 0:
        raise ConfigError(f"iterations={iterations}: give the number of iterations of pretraining")
    if asked != "all" and asked not in STAGES:
        from jahubert.train.experiment.config import unknown_name_error

        raise ConfigError(unknown_name_error("stage", str(asked), [*STAGES, "all"], missing=asked is None))
    if tree["system"] is not None and tree["system"] not in systems:
        from jahubert.train.experiment.config import unknown_name_error

        raise ConfigError(unknown_name_error("system", str(tree["system"]), systems))
    if tree["decoding"] is not None and not re.fullmatch(r"[\w.-]+", tree["decoding"]):
        raise ConfigError(f"decoding={tree['decoding']}: give a name for a folder: letters, digits, . _ -")
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
    from jahubert.train.experiment import distributed, provenance
    from jahubert.train.experiment.config import default_fields
    from jahubert.train.experiment.disk_full import report_disk_full
    from jahubert.train.experiment.lock import run_lock
    from jahubert.train.experiment.out_of_memory import report_oom
    from jahubert.train.experiment.registry import STAGES, resolve

    module = resolve(stage, STAGES, "stage")
    keep, first = getattr(module, "KEEP", True), distributed.rank() == 0

    def begin() -> tuple[dict[str, Any], bool]:
        recipe = provenance.stage_inputs(stage, module.VERSION, config)
        out.mkdir(parents=True, exist_ok=True)
        if not (keep and (out / provenance.DONE).exists()):
            claim.enter_context(run_lock(out))
        return recipe, keep and provenance.acquire(out, recipe, default_fields(config))

    with ExitStack() as claim:
        with report_disk_full(out):
            recipe, there = distributed.rank0_broadcast(begin)
        if there:
            log.info("%s: done before, kept", out)
            if first and hasattr(module, "kept"):
                module.kept(config, out)
            if first and (out / "table.txt").is_file():
                print((out / "table.txt").read_text(encoding="utf-8"))
            return provenance.read_record(out / provenance.DONE)["metrics"]
        log.info("%s ...", out)
        distributed.heartbeat(str(out))
        started = time.monotonic() - provenance.elapsed_seconds(out)
        try:
            with report_disk_full(out), report_oom(stage, config):
                metrics = module.run(config, out)
                if first and keep:
                    provenance.finish(out, recipe, metrics, time.monotonic() - started)
        except BaseException:
            if first:
                provenance.rollback(out, time.monotonic() - started)
            raise
        distributed.barrier()
    log.info("%s: done in %.1f s  %s", out, time.monotonic() - started, _shown(metrics))
    return metrics


def _processes(overrides: Sequence[str]) -> int:
    """How many processes are to be started here: none but this one if a launcher has started them."""
    if "WORLD_SIZE" in os.environ:
        return 1
    n = compose(overrides)["processes"]
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"processes={n}: give the number of processes on this machine")
    return n


def _hang_minutes(overrides: Sequence[str]) -> float:
    minutes = compose(overrides)["hang_minutes"]
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 <= minutes < math.inf:
        raise ConfigError(f"hang_minutes={minutes}: give a number of minutes, or 0 for no limit")
    return minutes


def _recipes() -> list[str]:
    from jahubert.train.experiment.registry import data_folder

    return sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))


def _hydra_main(argv: list[str]) -> None:
    """Hydra's own command line, for its flags: --multirun, launchers, --info."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from jahubert.train.experiment.registry import data_folder

    sys.argv = [sys.argv[0], *(arg if arg.startswith(("-", "hydra")) else _lenient(arg) for arg in argv)]

    @hydra.main(config_path=str(data_folder("conf").resolve()), config_name="config", version_base="1.3")
    def door(_: Any) -> None:
        join_slurm(os.environ)  # a launcher's job does not come through `main`
        if status := start([arg.removeprefix("++") for arg in HydraConfig.get().overrides.task]):
            sys.exit(status)

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
