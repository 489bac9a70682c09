"""Entry point of `jahubert run`: option parsing and dispatch to the stage runner."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import MutableMapping, Sequence
from typing import NoReturn

from jahubert.errors import ConfigError
from jahubert.streams import check_current_folder, failed_output
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.reporting import configure_logging, is_rank0, report_error
from jahubert.train.pipeline.signals import StopRequested, stop_signals

_DESCRIPTION = """\
Run stages of an experiment. Each stage writes to its own folder below exp/NAME. Finished stages are kept.

  jahubert run recipe=demo stage=all
  jahubert run recipe=csj stage=finetune data=/path/to/CSJ pretrained=rinna/japanese-hubert-base subset=core

`python -m jahubert.run` is the same command."""
_EPILOG = """\
settings:
  recipe=NAME     a recipe in the package, or a folder with a recipe.yaml
  stage=STAGE     prepare, features, kmeans, label, pretrain, targets, finetune, decode, score or report;
                  all: all unfinished stages, in order
  iteration=N     iteration of features, kmeans, label and pretrain (default: 1)
  system=NAME     system of finetune, decode and score (default: all systems of the recipe)
  decoding=NAME   name of another decoding of the same model
  KEY=VALUE       any other setting, e.g. kmeans.n_clusters=200; ~KEY resets a setting to its default

exit status: 0 success, 1 other error, 2 error in the settings or the data, 75 stopped by a signal, 130
stopped by Ctrl-C (rerun to resume), 141 standard output is a closed pipe"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """Create the argument parser of `jahubert run`."""
    parser = _Parser(
        "jahubert run",
        usage="jahubert run [options] recipe=NAME stage=STAGE [KEY=VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    options = parser.add_argument_group("options")
    options.add_argument(
        "-h", "--help", action="store_true", help="print this help, and the settings if any are given"
    )
    options.add_argument("-c", "--cfg", choices=["job"], help="print all settings as YAML and exit")
    options.add_argument(
        "--info", action="store_true", help="print the selected stages and their states, and exit"
    )
    options.add_argument(
        "-m", "--multirun", action="store_true",
        help="run all combinations of KEY=A,B or KEY='range(1,4)'; hydra/launcher=slurm submits them as jobs",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit status (see `report_error`)."""
    join_slurm(os.environ)
    with stop_signals():
        try:
            check_current_folder()
            status = _run(list(argv))
            sys.stdout.flush()
            return status
        except (Exception, KeyboardInterrupt, StopRequested) as error:
            return report_error(error)


def _run(argv: list[str]) -> int:
    from jahubert.train.pipeline import inspection, multirun

    parser = build_parser()
    args, unknown = parser.parse_known_intermixed_args(argv)
    mistyped = [word for word in unknown if word.startswith("-")]
    if mistyped:
        raise ConfigError("\n".join(unknown_option(parser, word) for word in mistyped))
    settings = [*args.settings, *unknown]
    if args.help or args.cfg or args.info:
        shown = parser.format_help() if args.help else ""
        if settings or not args.help:
            show = inspection.stage_list if args.info else inspection.settings_yaml
            runs = [run.overrides for run in multirun.expand(settings)] if args.multirun else [settings]
            shown += "\nsettings of this command:\n\n" if args.help else ""
            shown += "---\n".join(show(overrides) for overrides in runs)
        try:
            print(shown, end="", flush=True)
        except OSError as error:
            return failed_output(error)
        return 0
    configure_logging(logging.INFO if is_rank0() else logging.WARNING)
    if args.multirun:
        return multirun.run_all(settings)
    launcher = [word for word in settings if word.startswith(("hydra/", "hydra."))]
    if launcher:
        raise ConfigError(f"{launcher[0]}: requires --multirun")
    return runner.start(settings)


def unknown_option(parser: argparse.ArgumentParser, word: str) -> str:
    """Return an error message, with a suggestion, for an option that does not exist."""
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
    return f"{word}: no such option; {hint}"


def join_slurm(environment: MutableMapping[str, str]) -> None:
    """Set the environment variables of torch.distributed for the tasks of a SLURM job step.

    SLURM_NTASKS is not used, because it is also set in a batch script, which is a single process.
    """
    n_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if n_tasks == "1" or "WORLD_SIZE" in environment:
        return
    # For example, node[017-020,031],other3 becomes node017.
    first_node = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).partition(",")[0]
    environment["WORLD_SIZE"], environment["RANK"] = n_tasks, environment["SLURM_PROCID"]
    # With --gpus-per-task=1, each task sees only its own GPU, as device 0.
    sees_one_gpu = re.fullmatch("[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    environment["LOCAL_RANK"] = "0" if sees_one_gpu else environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_node)
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))
