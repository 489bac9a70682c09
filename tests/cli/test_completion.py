"""Tests that shells accept the completion scripts and complete commands and their arguments."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
from fixtures.terminal import Terminal

from jahubert.cli.completion import SHELLS, script
from jahubert.cli.main import build_parser, main

shtab = pytest.importorskip("shtab", reason="needs the extra completion")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish not found")
@pytest.mark.parametrize(
    ("line", "completed"),
    [("jahubert run recipe=demo stage=km", "stage=kmeans"), ("jahubert transcribe a.wav ta", "talk.wav")],
)
def test_fish_completes_every_argument(line, completed, tmp_path):
    (tmp_path / "script").write_text(script(build_parser(), "fish"))
    (tmp_path / "talk.wav").touch()
    command = ["fish", "--no-config", "-c", f"source script; complete -C '{line}'"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert [candidate.split("\t")[0] for candidate in done.stdout.splitlines()] == [completed], done.stderr


# Commands that start each shell interactively without the user's files and load the completion script.
INTERACTIVE = {
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(cat script)"'),
    "tcsh": (["tcsh", "-f"], "source ./script"),
}


@pytest.mark.parametrize("shell", INTERACTIVE)
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("jahubert run recipe=demo seed=1 stage=km", "stage=kmeans"),
        ("jahubert transcribe -f s", "srt"),
        ("jahubert transcribe a.wav ta", "talk.wav"),
    ],
)
def test_interactive_shell_completes_every_argument(shell, line, completed, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} not found")
    (tmp_path / "script").write_text(script(build_parser(), shell))
    (tmp_path / "talk.wav").touch()
    command, setup = INTERACTIVE[shell]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm"}
    with Terminal() as terminal:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=terminal.slave,
            stdout=terminal.slave,
            stderr=terminal.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # sets the controlling terminal
        )
        try:
            os.write(terminal.master, f"{setup}; echo rea''dy\n".encode())
            wait_until(lambda: "ready" in terminal.written)
            os.write(terminal.master, f"{line}\t".encode())
            wait_until(lambda: completed in terminal.written)
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_printed_and_valid(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("transcribe", "recipe=demo", "stage=kmeans", "textgrid"))
    # tcsh and PowerShell cannot check the syntax of a script.
    if shell in ("tcsh", "powershell") or shutil.which(shell) is None:
        return
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", "script"], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_shtab_is_one_line_that_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    error = capsys.readouterr().err
    assert ".[completion]" in error and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full not found")
def test_full_disk_as_standard_output_is_reported():
    code = "import sys; from jahubert.cli.main import main; sys.exit(main(['completion', 'bash']))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (
        1,
        "jahubert: error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize("arguments", [["nothing"], ["run", "--nothing"], ["status", "missing"]])
def test_error_whose_message_cannot_be_written_keeps_its_status(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import sys; from jahubert.cli.main import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], stderr=writer, cwd=tmp_path, timeout=60)
    os.close(writer)
    assert done.returncode == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
@pytest.mark.parametrize(
    "arguments", ["completion bash", "run --help", "run recipe=demo stage=prepare --info"]
)
@pytest.mark.parametrize("output", [">&-", "< /dev/null >&- 2>&-", "<&- >&-", "> /dev/full"])
def test_closed_or_full_output_is_an_error(tmp_path, arguments, output):
    line = f"'{sys.executable}' -m jahubert {arguments} {output}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if "full" in output else 2)
    assert ("2>&-" in output) == (done.stderr == "")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
