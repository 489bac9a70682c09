"""The command `jahubert run`.

    jahubert run recipe=NAME stage=STAGE [iteration=N] [system=NAME] [decoding=NAME] [key=value ...]

`stage=all` runs all stages that are not done yet, in order, for all iterations and systems.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

from jahubert.train.pipeline import runner
from jahubert.train.pipeline.reporting import configure_logging, is_rank0, report_error
from jahubert.train.pipeline.signals import StopRequested, stop_signals


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (2 for a user's mistake)."""
    argv = list(argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    join_slurm(os.environ)
    with stop_signals():
        try:
            configure_logging(logging.INFO if is_rank0() else logging.WARNING)
            if any(arg.startswith("-") for arg in argv):
                _hydra_main(argv)
            else:
                return runner.start(argv)
        except (Exception, KeyboardInterrupt, StopRequested) as error:
            return report_error(error)
    return 0


def join_slurm(environment: MutableMapping[str, str]) -> None:
    """Set the variables of torch.distributed for the tasks of a SLURM job step.

    A batch script has SLURM_NTASKS as well but is a single process, so only SLURM_STEP_NUM_TASKS counts.
    """
    n_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if n_tasks == "1" or "WORLD_SIZE" in environment:
        return
    # node[017-020,031],other3 -> node017
    first_node = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).partition(",")[0]
    environment["WORLD_SIZE"], environment["RANK"] = n_tasks, environment["SLURM_PROCID"]
    # With --gpus-per-task=1 a task sees only its own GPU, as device 0.
    sees_one_gpu = re.fullmatch("[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    environment["LOCAL_RANK"] = "0" if sees_one_gpu else environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_node)
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def _hydra_main(argv: list[str]) -> None:
    """Hydra's own command line, for its flags: --multirun, launchers, --info."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from jahubert.train.experiment.registry import data_folder

    sys.argv = [sys.argv[0], *(arg if arg.startswith(("-", "hydra")) else _lenient(arg) for arg in argv)]

    @hydra.main(config_path=str(data_folder("conf").resolve()), config_name="config", version_base="1.3")
    def entry_point(_: Any) -> None:
        join_slurm(os.environ)  # a launcher's job does not come through `main`
        overrides = [arg.removeprefix("++") for arg in HydraConfig.get().overrides.task]
        if status := runner.start(overrides):
            sys.exit(status)

    entry_point()


def _lenient(override: str) -> str:
    """Let Hydra accept unknown keys: our own check suggests the nearest known one."""
    key = override.split("=")[0]
    return override if key in ("model", "iteration") or override.startswith(("+", "~")) else f"++{override}"
