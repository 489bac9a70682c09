"""Completion scripts for bash, zsh and fish, generated from the argument parser."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """An option of a command and the values it accepts."""

    names: list[str]
    help: str
    choices: list[str]  # empty for file names and arbitrary text
    takes_value: bool


@dataclass(frozen=True)
class Command:
    """A command with its options and the `choices` of its positional arguments."""

    name: str
    help: str
    options: list[Option]
    choices: list[str]


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """Collect the subcommands of a parser."""
    (sub,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in sub._choices_actions}
    result = []
    for name, command in (sub.choices or {}).items():
        options = [
            Option(
                list(action.option_strings),
                action.help or "",
                list(action.choices or []),
                action.nargs != 0,
            )
            for action in command._actions
            if action.option_strings
        ]
        choices = [str(c) for a in command._actions if not a.option_strings for c in a.choices or []]
        result.append(Command(name, helps.get(name, ""), options, choices))
    return result


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Generate the completion script for "bash", "zsh" or "fish"."""
    build = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return build(parser.prog, commands(parser))


def _bash(prog: str, commands: list[Command]) -> str:
    cases, values = [], []
    for command in commands:
        words = [name for option in command.options for name in option.names] + command.choices
        cases.append(f"    {command.name}) words={shlex.quote(' '.join(words))} ;;")
        for option in command.options:
            if option.choices:
                pattern = "|".join(f"{command.name}:{name}" for name in option.names)
                values.append(f"    {pattern}) words={shlex.quote(' '.join(option.choices))}; only=1 ;;")
    names = " ".join(command.name for command in commands)
    return f"""# {prog} completion bash > ~/.local/share/bash-completion/completions/{prog}
_{prog}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" only=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names}" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac
  case "${{COMP_WORDS[1]}}:$before" in
{chr(10).join(values)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [ -z "$only" ]; then
    local file
    while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -f -- "$current")
  fi
}}
complete -o filenames -F _{prog} {prog}
"""


def _zsh(prog: str, commands: list[Command]) -> str:
    def spec(option: Option) -> str:
        names = "{" + ",".join(option.names) + "}" if len(option.names) > 1 else option.names[0]
        text = option.help.replace("[", "(").replace("]", ")").replace(":", " ")
        value = f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"
        quoted = shlex.quote(f"[{text}]" + (value if option.takes_value else ""))
        return f"{names}{quoted}" if len(option.names) > 1 else shlex.quote(names) + quoted

    lines = [f"#compdef {prog}", f"# {prog} completion zsh > a folder of your fpath, as _{prog}"]
    lines += [f"_{prog}() {{", "  local -a commands", "  commands=("]
    lines += ["    " + shlex.quote(f"{c.name}:{c.help.replace(':', ' ')}") for c in commands]
    lines += ["  )", "  if (( CURRENT == 2 )); then", "    _describe command commands", "    return", "  fi"]
    lines += ["  local chosen=$words[2]", "  shift words", "  (( CURRENT-- ))", "  case $chosen in"]
    for command in commands:
        rest = f"*:argument:({' '.join(command.choices)})" if command.choices else "*:file:_files"
        arguments = " ".join([*(spec(option) for option in command.options), shlex.quote(rest)])
        lines.append(f"    {command.name}) _arguments {arguments} ;;")
    return "\n".join([*lines, "  esac", "}", f'_{prog} "$@"', ""])


def _fish(prog: str, commands: list[Command]) -> str:
    lines = [f"# {prog} completion fish > ~/.config/fish/completions/{prog}.fish"]
    for command in commands:
        about = shlex.quote(command.help)
        lines.append(f"complete -c {prog} -n __fish_use_subcommand -f -a {command.name} -d {about}")
        seen = f"-n '__fish_seen_subcommand_from {command.name}'"
        if command.choices:
            lines.append(f"complete -c {prog} {seen} -f -a {shlex.quote(' '.join(command.choices))}")
        for option in command.options:
            short = [f"-s {name[1:]}" for name in option.names if not name.startswith("--")]
            long = [f"-l {name[2:]}" for name in option.names if name.startswith("--")]
            value = ["-x -a " + shlex.quote(" ".join(option.choices))] if option.choices else []
            value = value or (["-r"] if option.takes_value else [])
            parts = [*short, *long, *value, "-d " + shlex.quote(option.help)]
            lines.append(f"complete -c {prog} {seen} {' '.join(parts)}")
    return "\n".join([*lines, ""])
