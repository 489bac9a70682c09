"""The utterances that a system got most wrong: what was said, what was heard, and what there is to hear."""

from __future__ import annotations

import base64
import heapq
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from jahubert.errors import AudioError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.phonemes import BOUNDARY
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation.metrics import ErrorCounts, align, count_errors
from jahubert.train.report import figures

LONGEST = 20.0  # seconds of an utterance that are heard and drawn: a page has to stay small

Words = list[list[str]]


@dataclass(frozen=True)
class Example:
    """One utterance; `steps` are (said, heard) phones and boundaries, None where one has nothing."""

    id: str
    split: str
    text: str
    seconds: float
    errors: ErrorCounts  # of phones
    steps: list[tuple[str | None, str | None]]
    sound: str = ""  # data address of an MP3; empty where the audio cannot be read any more
    figure: str = ""
    note: str = ""  # why there is no sound


def worst_examples(
    folder: Path, manifest: Manifest, times: dict[int, tuple[Phone, ...]], store: LabelStore | None, n: int
) -> list[Example]:
    """The `n` utterances of a `decode` folder with the highest phone error rate, the worst first.

    `times`: phones of the rows that have any; `store`: units of the manifest's rows.
    """
    found = heapq.nlargest(n, _measured(folder), key=lambda one: (one[0].rate, one[0].errors, one[2]["id"]))
    examples = []
    for errors, split, line in found:
        rows = manifest.indices(split=split)
        row = int(rows[manifest.ids(rows).index(line["id"])])
        item = manifest[row]
        steps = align(_with_boundaries(line["reference"]), _with_boundaries(line["hypothesis"]))
        try:
            wav_T = manifest.load(row, n_samples=min(item.n_samples, round(LONGEST * SAMPLE_RATE))).numpy()
            units = None if store is None else store[row][: HUBERT.n_frames(len(wav_T))]
            picture = figures.utterance(wav_T, times.get(row, ()), units)
            heard, note = mp3(wav_T), ""
        except AudioError as error:
            heard, picture, note = "", "", str(error)
        seconds = item.n_samples / SAMPLE_RATE
        examples.append(Example(item.id, split, item.text, seconds, errors, steps, heard, picture, note))  # type: ignore[arg-type]
    return examples


def _measured(folder: Path) -> Iterator[tuple[ErrorCounts, str, dict]]:
    for path in sorted(folder.glob("*.jsonl")):
        if path.name == "alignment.jsonl":
            continue
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                said, heard = (" ".join(line[side]).split() for side in ("reference", "hypothesis"))
                yield count_errors(said, heard), path.stem, line


def _with_boundaries(words: Sequence[str]) -> list[str]:
    return f" {BOUNDARY} ".join(words).split()


def mp3(wav_T: np.ndarray) -> str:
    """The sound as a data address, about 4 kB a second; every browser plays it."""
    stream = io.BytesIO()
    soundfile.write(stream, wav_T, SAMPLE_RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(stream.getvalue()).decode()
