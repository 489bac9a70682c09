"""Example utterances of a system with their error rate, alignment, audio and figure."""

from __future__ import annotations

import base64
import heapq
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from jahubert.errors import AudioError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.phonemes import BOUNDARY
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation.metrics import ErrorCounts, Pair, align, count_errors
from jahubert.train.report import figures

MAX_SECONDS = 20.0  # of audio and figure per utterance, which limits the size of the page


@dataclass(frozen=True)
class Example:
    """An utterance with aligned reference and hypothesis."""

    id: str
    split: str
    text: str
    seconds: float
    errors: ErrorCounts  # of phones
    pairs: list[Pair]  # phones and word boundaries
    audio: str = ""  # data URI of an MP3
    figure: str = ""  # data URI
    note: str = ""  # why there is no audio


@dataclass(frozen=True)
class _Decoded:
    """A line of a hypothesis file."""

    split: str
    line: dict[str, Any]
    errors: ErrorCounts

    @property
    def sort_key(self) -> tuple[float, int, str]:
        return self.errors.rate, self.errors.errors, self.line["id"]


def worst_examples(
    decode: Path, manifest: Manifest, times: dict[int, tuple[Phone, ...]], store: LabelStore | None, n: int
) -> list[Example]:
    """The `n` utterances in a folder of stage `decode` with the highest phone error rate, worst first.

    Args:
        times: phones of each manifest row that has any.
        store: units of the manifest's rows.
    """
    worst = heapq.nlargest(n, _decoded(decode), key=lambda decoded: decoded.sort_key)
    return [_example(decoded, manifest, times, store) for decoded in worst]


def _decoded(decode: Path) -> Iterator[_Decoded]:
    for path in sorted(decode.glob("*.jsonl")):
        if path.name == "alignment.jsonl":
            continue
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                reference, hypothesis = (" ".join(line[side]).split() for side in ("reference", "hypothesis"))
                yield _Decoded(path.stem, line, count_errors(reference, hypothesis))


def _example(
    decoded: _Decoded, manifest: Manifest, times: dict[int, tuple[Phone, ...]], store: LabelStore | None
) -> Example:
    line = decoded.line
    rows = manifest.indices(split=decoded.split)
    row = int(rows[manifest.ids(rows).index(line["id"])])
    utterance = manifest[row]
    audio = figure = note = ""
    try:
        n_samples = min(utterance.n_samples, round(MAX_SECONDS * SAMPLE_RATE))
        wav_T = manifest.load(row, n_samples=n_samples).numpy()
        units = None if store is None else store[row][: HUBERT.n_frames(len(wav_T))]
        figure = figures.utterance(wav_T, times.get(row, ()), units)
        audio = mp3(wav_T)
    except AudioError as error:
        note = str(error)
    return Example(
        id=utterance.id,
        split=decoded.split,
        text=utterance.text,
        seconds=utterance.n_samples / SAMPLE_RATE,
        errors=decoded.errors,
        pairs=align(_with_boundaries(line["reference"]), _with_boundaries(line["hypothesis"])),
        audio=audio,
        figure=figure,
        note=note,
    )


def _with_boundaries(words: Sequence[str]) -> list[str]:
    return f" {BOUNDARY} ".join(words).split()


def mp3(wav_T: np.ndarray) -> str:
    """Data URI of a waveform as MP3, about 4 kB per second; all browsers play it."""
    stream = io.BytesIO()
    soundfile.write(stream, wav_T, SAMPLE_RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(stream.getvalue()).decode()
