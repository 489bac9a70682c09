"""Completion scripts for the shells that shtab supports, generated from the argument parser."""

from __future__ import annotations

import argparse
import re
from types import ModuleType
from typing import Any

from jahubert.errors import MissingExtraError

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
_BASH_SETTINGS = """
_jahubert_settings() {
  local line="${COMP_LINE:0:COMP_POINT}" prefix="" candidate
  local word="${line##*[[:space:]]}"
  [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]] && prefix="${word%%=*}="
  while IFS= read -r candidate; do
    printf '%s\\n' "${candidate#"$prefix"}"
  done < <(compgen -W "WORDS" -- "$word")
}"""
_POWERSHELL_SETTINGS = """
function _jahubert_settings {
  param([string]$WordToComplete)
  'WORDS' -split ' ' | Where-Object { $_ -like "$WordToComplete*" }
}"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Generate the completion script for one of `SHELLS`.

    Raises:
        MissingExtraError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise MissingExtraError("shtab", "completion") from None
    for command in _commands(parser):
        for action in command._actions:
            if action.dest == "settings":
                action.complete = _settings()  # type: ignore[attr-defined]
            elif action.nargs != 0 and not action.choices and action.type is None:
                action.complete = _paths(shtab, action)  # type: ignore[attr-defined]
    return _complete_all_arguments(shtab.complete(parser, shell))


def _complete_all_arguments(text: str) -> str:
    """Make a script complete all arguments of a list. shtab completes only the first in zsh and tcsh."""
    text = re.sub(r'^( *")\(\*\)::?', r"\1*:", text, flags=re.MULTILINE)  # zsh
    settings = [f"'c/{key}=/({' '.join(values)})/'" for key, values in _setting_values().items()]
    return text.replace("'p/*/()/'", " ".join([*settings, "'p/*/f/'"]))  # tcsh


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of the subcommands."""
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(subparsers.choices.values())


def _paths(shtab: ModuleType, action: argparse.Action) -> dict[str, str]:
    paths: dict[str, str] = shtab.DIRECTORY if action.dest == "experiment" else shtab.FILE
    return paths


def _setting_values() -> dict[str, list[str]]:
    """Return the settings that the scripts complete, and the possible values of each."""
    from jahubert.train.experiment.registry import STAGES, recipe_names

    return {"recipe": recipe_names(), "stage": [*STAGES, "all"]}


def _settings() -> dict[str, Any]:
    """Return the entry that makes shtab complete settings, with one item per shell."""
    words = " ".join(f"{key}={value}" for key, values in _setting_values().items() for value in values)
    return {
        "bash": "_jahubert_settings",
        "zsh": f"({words})",
        "fish": words,
        "tcsh": f"({words})",
        "powershell": "_jahubert_settings",
        "preamble": {
            "bash": _BASH_SETTINGS.replace("WORDS", words),
            "powershell": _POWERSHELL_SETTINGS.replace("WORDS", words),
        },
    }
