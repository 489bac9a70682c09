"""Tests that shells accept the completion scripts, and that bash completes commands and their arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from jahubert.cli.completion import SHELLS, script
from jahubert.cli.main import build_parser, main

shtab = pytest.importorskip("shtab", reason="extra completion")


def candidates(line: str, folder) -> list[str]:
    """Return bash's completions at the end of a line. As in a terminal, "=" separates words."""
    words = line.replace("=", " = ").split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
{script(build_parser(), "bash")}
COMP_WORDBREAKS=' =:'; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
$(complete -p jahubert | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=folder, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_bash_completes_commands_formats_recipes_and_stages(tmp_path):
    (tmp_path / "talk.wav").touch()
    assert candidates("jahubert tr", tmp_path) == ["transcribe"]
    assert "--dtype" in candidates("jahubert transcribe --d", tmp_path)
    assert candidates("jahubert transcribe -f s", tmp_path) == ["srt"]
    assert candidates("jahubert transcribe ta", tmp_path) == ["talk.wav"]
    assert candidates("jahubert run recipe=de", tmp_path) == ["demo"]
    assert candidates("jahubert run recipe=demo stage=km", tmp_path) == ["kmeans"]
    assert candidates("jahubert plan rec", tmp_path)[0].startswith("recipe=")
    assert set(candidates("jahubert completion ", tmp_path)) == set(SHELLS)


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_printed_and_valid(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("transcribe", "recipe=demo", "stage=kmeans", "textgrid"))
    if shell == "tcsh" or shutil.which(shell) is None:  # tcsh cannot check the syntax of a script
        return
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", "script"], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_shtab_is_one_line_that_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    error = capsys.readouterr().err
    assert "jahubert[completion]" in error and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full not found")
def test_full_disk_as_standard_output_is_reported():
    code = "import sys; from jahubert.cli.main import main; sys.exit(main(['completion', 'bash']))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "jahubert: error: No space left on device\n")
