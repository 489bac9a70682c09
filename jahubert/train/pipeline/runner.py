"""Stage runner, which runs the stages of a command in this process or launches several processes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jahubert.errors import JahubertError
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.pipeline.reporting import is_rank0, report_error
from jahubert.train.pipeline.signals import check_stop

log = logging.getLogger("jahubert")

# Options of torch's CUDA allocator. torch 2.6 to 2.9 read the second variable; 2.9 warns unless the first one
# is set too. Later releases read both. With ROCm, the last one is also read.
_ALLOCATOR_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def start(overrides: Sequence[str]) -> int:
    """Run the stages in this process or in the configured number of processes. Return the exit status."""
    n_processes = processes_to_launch(overrides)
    configure_allocator(os.environ)
    check_stop()
    if n_processes > 1:
        from jahubert.train.experiment import distributed

        return distributed.launch([sys.executable, "-m", "jahubert.run", *overrides], n_processes)
    run(overrides)
    return 0


def configure_allocator(environment: MutableMapping[str, str]) -> None:
    """Let torch's CUDA allocator extend its segments, which reduces fragmentation.

    An option that the user has set is kept. The allocator reads the environment when it is first used. Other
    systems than Linux have no expandable segments.
    """
    if sys.platform == "linux" and not any(name in environment for name in _ALLOCATOR_OPTIONS):
        environment.update(dict.fromkeys(_ALLOCATOR_OPTIONS[:2], "expandable_segments:True"))


def run(overrides: Sequence[str]) -> None:
    """Run the stages that a list of `key=value` overrides selects.

    Raises:
        ConfigError: an override or a setting is invalid, or a check in `preflight` failed.
        StaleError, BusyError, DataError: see `run_stage`.
    """
    from jahubert.train.experiment import distributed
    from jahubert.train.pipeline import preflight
    from jahubert.train.trainer.watchdog import watchdog

    try:
        jobs = configure_jobs(overrides, check_inputs=True)
        settings = compose(overrides)
        timeout_minutes = settings["hang_timeout_minutes"]
        verify_large = settings["verify_large_inputs"]
    except JahubertError as error:
        error.reported = not is_rank0()  # all ranks raise the same error
        raise
    with distributed.process_group(report_error), watchdog(timeout_minutes):
        for job in jobs:
            check_stop()
            run_stage(*job, verify_large=verify_large)
            if job.stage == "prepare":
                preflight.check_splits(jobs)


def run_stage(stage: str, config: Any, out: Path, verify_large: bool = True) -> dict[str, Any]:
    """Run a stage, or keep the finished result in its folder. Return the metrics of the stage.

    Args:
        verify_large: whether to verify the checksums of input files over 1 GiB. The sizes of all files and
            the checksums of smaller files are always verified.

    Raises:
        StaleError: the stage was run in the folder with different settings or by another version of its code.
        BusyError: another run is using the folder.
        DataError: an input file is missing or damaged, or a record is unreadable.

    Exceptions that the stage raises propagate. Errors caused by the file system or exhausted memory are
    converted (see `resource_errors`).
    """
    from jahubert.formats.atomic import remove_leftovers
    from jahubert.formats.lock import remove_stale_lock, run_lock
    from jahubert.train.experiment import distributed, provenance
    from jahubert.train.experiment.config import default_fields
    from jahubert.train.experiment.registry import STAGES, resolve
    from jahubert.train.experiment.resource_errors import report_file_errors, report_oom

    module = resolve(stage, STAGES, "stage")
    keep_result = getattr(module, "KEEP", True)
    is_first = distributed.rank() == 0

    def acquire() -> tuple[dict[str, Any], bool]:
        inputs = provenance.stage_inputs(stage, module.VERSION, config)
        out.mkdir(parents=True, exist_ok=True)
        if not (keep_result and (out / provenance.DONE).exists()):
            lock.enter_context(run_lock(out))
            remove_leftovers(out)
        return inputs, keep_result and provenance.acquire(out, inputs, default_fields(config))

    with ExitStack() as lock:
        with report_file_errors(out):
            inputs, is_done = distributed.rank0_broadcast(acquire)
        if is_done:
            log.info("%s: already done, kept", out)
            if is_first:
                remove_stale_lock(out)
                _show_finished(module, config, out)
            metrics: dict[str, Any] = provenance.read_record(out / provenance.DONE)["metrics"]
            return metrics
        log.info("%s ...", out)
        distributed.heartbeat(f"running stage {out}")
        started = time.monotonic() - provenance.elapsed_seconds(out)
        try:
            with report_file_errors(out), report_oom(stage, config):
                distributed.rank0_broadcast(lambda: verify_inputs(config, verify_large))
                metrics = module.run(config, out)
                if is_first and keep_result:
                    provenance.finish(out, inputs, metrics, time.monotonic() - started)
        except BaseException:
            if is_first:
                provenance.rollback(out, time.monotonic() - started)
            raise
        distributed.barrier()
    log.info("%s: done in %.1f s  %s", out, time.monotonic() - started, _format_metrics(metrics))
    return metrics


def verify_inputs(config: Any, large: bool = True) -> None:
    """Verify the sizes and checksums of a stage's input files, and the contents of manifests.

    Raises:
        DataError: a file is missing or damaged.
    """
    from jahubert.train.data.manifest import Manifest
    from jahubert.train.experiment import provenance
    from jahubert.train.experiment.config import input_fields

    provenance.verify_inputs(config, large)
    for _, path, _ in input_fields(config):
        if path.suffix == ".arrow" and path.is_file():
            Manifest(path).validate()


def _show_finished(module: Any, config: Any, out: Path) -> None:
    """Print the result of a stage that an earlier run finished."""
    if hasattr(module, "kept"):
        module.kept(config, out)
    if (out / "table.txt").is_file():
        print((out / "table.txt").read_text(encoding="utf-8"))


def _format_metrics(metrics: dict[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def processes_to_launch(overrides: Sequence[str]) -> int:
    """Return the number of processes to launch, which is 1 if a launcher has already started them."""
    return 1 if "WORLD_SIZE" in os.environ else compose(overrides)["processes"]
