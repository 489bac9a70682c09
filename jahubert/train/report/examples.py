"""Example utterances of a system, each with its error rate, alignment, audio and figure."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile

from jahubert.errors import AudioError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.phonemes import BOUNDARY, PhonemeSet
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation.metrics import ErrorCounts, Pair, align, count_errors
from jahubert.train.evaluation.scoring import ScoredUtterance, SetScore, Words, measures_for, read_hypotheses
from jahubert.train.report import figures

MAX_SECONDS = 20.0  # maximum length of audio and figures, to limit the size of the page


@dataclass(frozen=True)
class Example:
    """An utterance whose reference and hypothesis are aligned."""

    id: str
    split: str
    text: str
    seconds: float
    errors: dict[str, ErrorCounts]  # by the name of the measure
    word_pairs: list[Pair]  # aligned words, each a tuple of symbols
    symbol_pairs: list[Pair]  # aligned symbols and word boundaries
    has_phones: bool  # whether symbols are phones, which are displayed as kana
    audio: str = ""  # data URI of an MP3
    figure: str = ""  # data URI of the figure
    note: str = ""  # reason if the audio is missing or unusable


@dataclass(frozen=True)
class _Decoded:
    """One line of a hypothesis file."""

    split: str
    utterance: ScoredUtterance
    errors: ErrorCounts  # symbol errors

    @property
    def sort_key(self) -> tuple[float, int, str]:
        """Sort key, best first. Among utterances without errors, longer ones are considered better."""
        return self.errors.rate, self.errors.errors or -self.errors.length, self.utterance.id


def find_examples(
    decode: Path, manifest: Manifest, times: dict[int, tuple[Phone, ...]], store: LabelStore | None, n: int
) -> dict[str, list[Example]]:
    """Return the `n` "worst", "median" and "best" utterances in a decode folder by symbol error rate.

    The groups do not overlap, so small sets have fewer examples.

    Args:
        times: mapping from manifest rows to the phones of the utterance, where available.
        store: units of the utterances in the manifest.
    """
    phonemes = PhonemeSet.from_json(json.loads((decode / "phonemes.json").read_text(encoding="utf-8")))
    ranked = sorted(_decoded(decode), key=lambda decoded: decoded.sort_key, reverse=True)
    worst, rest = ranked[:n], ranked[n:]
    best, rest = rest[::-1][:n], rest[: max(0, len(rest) - n)]
    first = max(0, (len(rest) - n) // 2)
    groups = {"worst": worst, "median": rest[first : first + n], "best": best}
    return {
        group: [_example(decoded, manifest, times, store, phonemes) for decoded in members]
        for group, members in groups.items()
    }


def _decoded(decode: Path) -> Iterator[_Decoded]:
    for path in sorted(decode.glob("*.jsonl")):
        if path.name == "alignment.jsonl":
            continue
        for utterance in read_hypotheses(path):
            reference, hypothesis = (list(chain(*words)) for words in _sides(utterance))
            yield _Decoded(path.stem, utterance, count_errors(reference, hypothesis))


def _sides(utterance: ScoredUtterance) -> tuple[Words, Words]:
    return utterance.reference, utterance.hypothesis


def _example(
    decoded: _Decoded,
    manifest: Manifest,
    times: dict[int, tuple[Phone, ...]],
    store: LabelStore | None,
    phonemes: PhonemeSet,
) -> Example:
    scored = SetScore([decoded.utterance], measures_for(phonemes))
    sides = _sides(decoded.utterance)
    rows = manifest.indices(split=decoded.split)
    row = int(rows[manifest.ids(rows).index(decoded.utterance.id)])
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
        errors={name: counts for name, (counts,) in scored.counts.items()},
        word_pairs=align(*sides),
        symbol_pairs=align(*map(_with_boundaries, sides)),
        has_phones=scored.has_phones,
        audio=audio,
        figure=figure,
        note=note,
    )


def _with_boundaries(words: Words) -> list[str]:
    return [symbol for word in words for symbol in (BOUNDARY, *word)][1:]


def mp3(wav_T: np.ndarray) -> str:
    """Encode a waveform as the data URI of an MP3 (about 4 kB per second), which all browsers can play."""
    stream = io.BytesIO()
    soundfile.write(stream, wav_T, SAMPLE_RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(stream.getvalue()).decode()
