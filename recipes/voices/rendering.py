"""Synthesis of the audio files of utterances, in several processes if there are many.

The processes run this file. They import neither torch nor the text front end, because the parameters of an
utterance (`Line`) include the labels of its sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from hts_engine import HtsEngine, Style

from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.flac import write_flac
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.experiment.script_processes import run_in_processes, run_items

VERSION = 1  # version of the generated audio; part of every file name

add_noise = recipe_module("demo", "noise").add_noise


@dataclass(frozen=True)
class Line:
    """A line to be spoken: all parameters that determine the audio of an utterance."""

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
    """Synthesize lines, and write their audio to `work`.

    Raises:
        DataError: a process ended with a user error.
        JahubertError: a process failed.
    """
    run_in_processes(Path(__file__), lines, work, processes, _write)


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


def _read_line(fields: dict[str, Any]) -> Line:
    style = fields.pop("style")
    style["weights"] = tuple(style["weights"])
    for name in ("labels", "voices", "digests"):
        fields[name] = tuple(fields[name])
    return Line(style=Style(**style), **fields)


if __name__ == "__main__":
    run_items(_read_line, _write)
