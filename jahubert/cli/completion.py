"""Completion scripts for the shells that shtab supports, generated from the argument parser."""

from __future__ import annotations

import argparse
from types import ModuleType

from jahubert.errors import MissingExtraError

SHELLS = ("bash", "zsh", "fish", "tcsh")
# Candidates must not repeat the text before "=", because bash splits words there.
_BASH_SETTINGS = """
_jahubert_settings() {
  local line="${COMP_LINE:0:COMP_POINT}" prefix="" candidate
  local word="${line##*[[:space:]]}"
  [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]] && prefix="${word%%=*}="
  while IFS= read -r candidate; do
    printf '%s\\n' "${candidate#"$prefix"}"
  done < <(compgen -W "WORDS" -- "$word")
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
    return shtab.complete(parser, shell)


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of the subcommands."""
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(subparsers.choices.values())


def _paths(shtab: ModuleType, action: argparse.Action) -> dict:
    return shtab.DIRECTORY if action.dest == "experiment" else shtab.FILE


def _settings() -> dict:
    """Return the completion of the settings `recipe=` and `stage=` for each shell."""
    from jahubert.train.experiment.registry import STAGES, recipe_names

    values = [f"recipe={name}" for name in recipe_names()]
    values += [f"stage={name}" for name in (*STAGES, "all")]
    words = " ".join(values)
    return {
        "bash": "_jahubert_settings",
        "zsh": f"({words})",
        "fish": words,
        "tcsh": f"({words})",
        "preamble": {"bash": _BASH_SETTINGS.replace("WORDS", words)},
    }
