"""Tests of the completion scripts in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from jahubert.cli.completion import commands, script
from jahubert.cli.main import build_parser, main


def completions(line: str, folder) -> list[str]:
    """Return the completions that bash offers at the end of `line`."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
{script(build_parser(), "bash")}
COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _jahubert
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=folder, timeout=30)
    assert result.returncode == 0 and result.stderr == ""
    return result.stdout.split("\n")[:-1]


def test_bash_completes_commands_options_and_files(tmp_path):
    (tmp_path / "日本語 名前.wav").touch()
    names = [command.name for command in commands(build_parser())]
    assert completions("jahubert ", tmp_path) == names
    assert completions("jahubert tr", tmp_path) == ["transcribe"]
    assert "--dtype" in completions("jahubert transcribe --", tmp_path)
    assert completions("jahubert transcribe -f s", tmp_path) == ["srt"]
    assert completions("jahubert convert a b --to t", tmp_path) == ["torchaudio"]
    assert completions("jahubert transcribe 日", tmp_path) == ["日本語 名前.wav"]
    assert completions("jahubert completion z", tmp_path) == ["zsh"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_accept_their_script(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    result = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stderr) == (0, "")


def test_fish_completes_option_values():
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    code = script(build_parser(), "fish") + "complete -C 'jahubert transcribe --format s'\n"
    result = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, timeout=30)
    assert result.stderr == ""
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["srt"]


def test_full_disk_on_standard_output_is_reported():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    code = "import sys; from jahubert.cli.main import main; sys.exit(main(['completion', 'bash']))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "jahubert: error: No space left on device\n")
