"""Synthesis of audio files for planned lines in several processes.

A process is started as `python rendering.py` and receives its job on standard input. The process imports
neither torch nor the text front end, because each line contains its labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from hts_engine import HtsEngine, Style

from jahubert.errors import JahubertError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.flac import write_flac
from jahubert.train.experiment.registry import recipe_folder, resolve

VERSION = 1  # version of the generated audio, which is part of every file name
_LINES_PER_PROCESS = 8  # minimum number of lines per process

add_noise: Callable[..., np.ndarray] = resolve(
    f"{recipe_folder('demo') / 'noise.py'}:add_noise", {}, "recipe"
)


@dataclass(frozen=True)
class Line:
    """All parameters that determine the audio of an utterance."""

    labels: tuple[str, ...]  # full-context labels of Open JTalk
    voices: tuple[str, ...]  # paths of the voice files
    digests: tuple[str, ...]  # digests of the voice files
    style: Style
    lead: int  # number of frames removed from the silence at the start
    tail: int  # number of frames removed from the silence at the end
    level_db: float
    snr_db: float
    tilt: float
    noise: int

    def path(self, work: Path) -> Path:
        """Return the path of the audio, which depends on the content of the voices and not on their paths."""
        content = {name: value for name, value in asdict(self).items() if name != "voices"}
        key = hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()
        return work / key[:2] / f"{key[2:22]}.flac"


def render(lines: Sequence[Line], work: Path, processes: int) -> None:
    """Write the audio of the lines to `work`.

    Raises:
        JahubertError: a process failed.
    """
    run_lines(Path(__file__), lines, work, processes, _write)


def run_lines(
    script: Path, lines: Sequence[Any], work: Path, processes: int, write: Callable[[Any, Path], None]
) -> None:
    """Write the audio of lines in this process or, if there are many lines, in processes that run `script`.

    Args:
        script: Python file that reads its share of the lines with `read_job` and calls `write`.
        lines: dataclass instances that describe the lines.
        work: folder for the audio.
        processes: maximum number of processes.
        write: function that writes the audio of one line.

    Raises:
        JahubertError: a process failed.
    """
    processes = min(processes, len(lines) // _LINES_PER_PROCESS)
    if processes <= 1:
        for line in lines:
            write(line, work)
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def run(share: Sequence[Any]) -> subprocess.CompletedProcess:
        job = json.dumps([str(work), [asdict(line) for line in share]])
        command = [sys.executable, str(script)]
        return subprocess.run(command, input=job, capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(processes) as pool:
        for done in pool.map(run, [lines[i::processes] for i in range(processes)]):
            if done.returncode:
                raise JahubertError(f"a process that synthesizes speech failed:\n{done.stderr[-2000:]}")


def read_job() -> tuple[Path, list[dict[str, Any]]]:
    """Read the folder for the audio and the lines, as dictionaries, from standard input."""
    folder, lines = json.load(sys.stdin)
    return Path(folder), lines


@cache
def engine(voices: tuple[str, ...]) -> HtsEngine:
    """Create an engine with the given voice files."""
    return HtsEngine([Path(voice) for voice in voices])


def waveform(line: Line) -> np.ndarray:
    """Synthesize a line as int16 (T,) at 16 kHz."""
    hts = engine(line.voices)
    wave = hts.synthesize(line.labels, line.style)
    wave = wave[line.lead * hts.frame_samples : len(wave) - line.tail * hts.frame_samples]
    wave_T = soxr.resample(wave, hts.sample_rate, SAMPLE_RATE)
    return add_noise(wave_T, level_db=line.level_db, snr_db=line.snr_db, tilt=line.tilt, seed=line.noise)


def _write(line: Line, work: Path) -> None:
    write_flac(line.path(work), waveform(line))


def _read_line(fields: dict) -> Line:
    style = fields.pop("style")
    style["weights"] = tuple(style["weights"])
    for name in ("labels", "voices", "digests"):
        fields[name] = tuple(fields[name])
    return Line(style=Style(**style), **fields)


if __name__ == "__main__":
    folder, job = read_job()
    for fields in job:
        _write(_read_line(fields), folder)
