"""Synthetic corpus of many speakers, whose voices are mixtures of HTS voices.

The recipe uses the voice of pyopenjtalk-plus and, if given, a folder of voices. A speaker is a random mixture
of one or two compatible voices with a random vocal tract length, pitch and speed, determined by the seed.
Phone times are exact, because they are computed from the HTS engine's state durations. Sentences come from
the word lists of the `demo` recipe and, if given, from a file. Speech of a neural model can be added
(neural.py).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import neural
from hts_engine import Style, voice_header
from rendering import Line, engine, render

from jahubert.audio import AudioSource
from jahubert.audio.search import is_sidecar
from jahubert.errors import DataError, JahubertError, quote
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import usable_cores
from jahubert.train.data.flac import flac_length
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import is_folder, read_reliably, read_text
from jahubert.train.experiment.config import expand_user, interval_errors, raise_config_errors
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.text.japanese import analyze, features_to_words, openjtalk
from jahubert.train.text.normalization import recognized_characters

log = logging.getLogger(__name__)

demo = recipe_module("demo")

_BATCH_LINES = 1000  # utterances per batch; with so many, the time to start the processes is negligible
_ALPHA = 0.55  # all-pass constant of an unchanged voice at 48 kHz
_HALF_TONES_PER_ALPHA = -50.0  # a longer vocal tract goes with a lower pitch
_CORPUS_LINE = re.compile(r"[\w-]+:(?P<text>[^,]+),[ァ-ヺー、。！？]+$")  # ID:text with furigana,kana
_PUNCTUATION = re.compile("[、。，．！？!?…]+")
_FURIGANA = re.compile(r"\([ぁ-ゖァ-ヺー]+\)")


@dataclass(frozen=True)
class Config:
    # File of sentences: .tsv with a column text, or one sentence per line (also ID:漢字(かんじ),カナ).
    texts: str | None = None
    # Files of sentences to exclude, in the same formats.
    exclude: tuple[str, ...] = ()
    # Fraction of the sentences that come from the demo recipe. Unless it is 0, they are also used
    # when those of `texts` run out.
    own_share: float = 0.25
    minutes: float = 60.0  # total duration of all splits, without neural_minutes
    dev_share: float = 0.03  # fraction of the minutes in dev
    test_share: float = 0.05  # fraction of the minutes in test
    speakers: int = 200  # number of speakers in train; dev and test each have other speakers, a tenth as many
    alpha: tuple[float, float] = (0.49, 0.62)  # range of the all-pass constant; 0.55 means no change
    # Range of the pitch shift in semitones, in addition to the shift that depends on alpha.
    half_tones: tuple[float, float] = (-4.0, 4.0)
    speed: tuple[float, float] = (0.8, 1.25)  # range of speeds
    snr_db: tuple[float, float] = (20.0, 50.0)  # range of signal-to-noise ratios in dB (stationary noise)
    neural_minutes: float = 0.0  # duration of the speech by neural voices (neural.py), all in train
    processes: int = 0  # number of processes; 0: one per core, at most 8

    def __post_init__(self) -> None:
        problems = []
        if self.minutes <= 0:
            problems.append(f"minutes must be above 0; found {self.minutes}")
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share >= 1:
            found = f"{self.dev_share} and {self.test_share}"
            problems.append(
                f"dev_share and test_share must be at least 0 and sum to less than 1; found {found}"
            )
        if self.neural_minutes < 0:
            problems.append(f"neural_minutes must be at least 0; found {self.neural_minutes}")
        if not 0 <= self.own_share <= 1:
            problems.append(f"own_share must be between 0 and 1; found {self.own_share}")
        if self.speakers < 1:
            problems.append(f"speakers must be at least 1; found {self.speakers}")
        limits = {"alpha": (0.4, 0.7), "half_tones": (-24, 24), "speed": (0.5, 2), "snr_db": (0, 100)}
        raise_config_errors(problems + interval_errors(self, limits))


@dataclass(frozen=True)
class Voice:
    """An HTS voice file."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Speaker:
    """A speaker: a group of compatible voices, and a style that contains their weights."""

    name: str
    voices: tuple[Voice, ...]
    style: Style


def prepare(
    data: Path | None, work: Path, config: Config, seed: int, seen: set[str] | None = None
) -> Iterator[Utterance | Rejected]:
    """Yield the utterances `voices-<split>-NNNNN`. The splits share neither sentences nor speakers.

    `data` is a folder that contains HTS voices at any depth. Without it, only the voice of pyopenjtalk-plus
    is used. Audio is written to `work` as 16 kHz FLAC, and existing files are kept.

    If `neural_minutes` is positive, the utterances `neural-train-NNNNN` with other sentences follow.

    Args:
        seen: see `synthesize`.

    Raises:
        ConfigError: a package for the neural voices is not installed.
        DataError: voices cannot be used (see `find_voices` and `neural.synthesize`), or a file with sentences
            cannot be read.
        MissingExtraError: pyopenjtalk-plus is not installed.
        JahubertError: the synthesis of speech failed.
    """
    if config.neural_minutes:
        neural.check_installed()
    given = read_sentences(expand_user(config.texts)) if config.texts else []
    random.Random(f"voices {seed}").shuffle(given)
    texts = _mix(given, config.own_share, seed)
    seen = excluded_sentences(config) if seen is None else seen
    yield from synthesize(texts, work, config, seed, data, seen)
    if config.neural_minutes:
        yield from neural.synthesize(
            _phrases(texts, seen),
            work,
            data,
            minutes=config.neural_minutes,
            speakers=config.speakers,
            speed=config.speed,
            snr_db=config.snr_db,
            seed=seed,
            processes=_n_processes(config),
        )


def synthesize(
    texts: Iterable[str],
    work: Path,
    config: Config,
    seed: int,
    data: Path | None = None,
    seen: set[str] | None = None,
) -> Iterator[Utterance | Rejected]:
    """Synthesize texts in order until `config.minutes` are reached or the texts end.

    Args:
        texts: sentences, of which repeated and excluded ones are skipped.
        work: folder for the audio.
        config: the options, of which `texts`, `own_share` and `neural_minutes` are not used.
        seed: seed for all random choices.
        data: folder with HTS voices.
        seen: letters and digits of the sentences to skip (default: `excluded_sentences`). The letters and
            digits of each sentence taken from `texts` are added to this set.

    Yields:
        Utterances whose audio has been written, and rejected sentences.
    """
    seen = excluded_sentences(config) if seen is None else seen
    plan = _plan(texts, work, config, seed, find_voices(data), seen)
    while batch := list(itertools.islice(plan, _BATCH_LINES)):
        render(
            [
                line
                for line, item in (entry for entry in batch if isinstance(entry, tuple))
                if flac_length(line.path(work)) != item.n_samples
            ],
            work,
            _n_processes(config),
        )
        for entry in batch:
            yield entry if isinstance(entry, Rejected) else entry[1]


def find_voices(folder: Path | None) -> list[list[Voice]]:
    """Group the voices in a folder and the voice of pyopenjtalk-plus into sets of mixable voices.

    Raises:
        DataError: the folder is missing or has no voices, a file cannot be read or is not an HTS voice, or
            two voices have the same file name.
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    if folder and not is_folder(folder):
        raise DataError(f"{folder}: folder not found; set data= to a folder with HTS voices (*.htsvoice)")
    paths = sorted(path for path in folder.rglob("*.htsvoice") if not is_sidecar(path)) if folder else []
    if folder and not paths:
        raise DataError(f"{folder}: no file *.htsvoice found")
    named = {path.stem: path for path in paths}
    if len(named) < len(paths):
        raise DataError(f"{folder}: several voices have the same file name")
    named["pyopenjtalk"] = Path(os.fsdecode(openjtalk().DEFAULT_HTS_VOICE))
    groups: dict[bytes, list[Voice]] = {}
    digests: set[str] = set()
    for name, path in named.items():
        content = read_reliably(path.read_bytes, path)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in digests:
            digests.add(digest)
            groups.setdefault(voice_header(content, path), []).append(Voice(name, path, digest))
    return list(groups.values())


def draw_speaker(groups: Sequence[Sequence[Voice]], config: Config, key: str) -> Speaker:
    """Draw a random speaker, determined by `key`, the voices and the ranges in `config`.

    The probability of a group of voices is proportional to the square root of its size, because the voices
    in a large group are styles of a few people.
    """
    rng = random.Random(f"speaker {key}")
    group = rng.choices(groups, [len(group) ** 0.5 for group in groups])[0]
    mixed = sorted(rng.sample(range(len(group)), min(len(group), rng.choice((1, 2, 2)))))
    share = round(rng.uniform(0.2, 0.8), 2)
    weights = [0.0] * len(group)
    for i, weight in zip(mixed, (share, 1 - share) if len(mixed) == 2 else (1.0,), strict=True):
        weights[i] = weight
    alpha = round(rng.uniform(*config.alpha), 3)
    half_tones = rng.uniform(*config.half_tones) + _HALF_TONES_PER_ALPHA * (alpha - _ALPHA)
    style = Style(tuple(weights), alpha, round(half_tones, 1), round(rng.uniform(*config.speed), 2))
    return Speaker(f"{'+'.join(group[i].name for i in mixed)}-{key}", tuple(group), style)


def _plan(
    texts: Iterable[str],
    work: Path,
    config: Config,
    seed: int,
    groups: Sequence[Sequence[Voice]],
    seen: set[str],
) -> Iterator[tuple[Line, Utterance] | Rejected]:
    """Yield the parameters and the utterance of each sentence for test, dev and train, in this order.

    The utterances have a total duration of `minutes`, unless the texts end first. A sentence that cannot be
    synthesized is yielded as rejected.
    """
    total = config.minutes * 60 * SAMPLE_RATE
    remaining = {"test": total * config.test_share, "dev": total * config.dev_share}
    remaining["train"] = total - sum(remaining.values())
    splits = [split for split, samples in remaining.items() if samples > 0]
    counts = dict.fromkeys(splits, 0)
    for i, text in enumerate(texts):
        if not splits:
            break
        if (characters := recognized_characters(text)) in seen:
            continue
        seen.add(characters)
        split = splits[0]
        rng = random.Random(f"voices {seed} {i}")
        n_speakers = config.speakers if split == "train" else max(1, config.speakers // 10)
        speaker = draw_speaker(groups, config, f"{split}-{seed}-{rng.randrange(n_speakers):04d}")
        identifier = f"voices-{split}-{counts[split]:05d}"
        try:
            line, item = _utterance(text, speaker, config, rng, work)
        except DataError as error:
            yield Rejected(f"text-{i:05d}", "no reading", str(error))
        except JahubertError as error:
            yield Rejected(f"text-{i:05d}", "labels disagree with the phones of the text", f"{text}: {error}")
        else:
            yield line, replace(item, id=identifier, split=split)
            counts[split] += 1
            remaining[split] -= item.n_samples
            if remaining[split] <= 0:
                del splits[0]
    if splits:
        done = config.minutes - sum(max(0.0, n) for n in remaining.values()) / 60 / SAMPLE_RATE
        log.warning("voices: ran out of sentences after %.1f of %g minutes", done, config.minutes)


def _utterance(
    text: str, speaker: Speaker, config: Config, rng: random.Random, work: Path
) -> tuple[Line, Utterance]:
    """Plan the utterance of a sentence by a speaker, without id and split.

    Raises:
        DataError: the text has no words, or letters without a reading.
        JahubertError: the phones in the labels differ from those of the text, the engine failed, or its
            frames are not whole numbers of 16 kHz samples.
    """
    features = analyze(text)
    words = features_to_words(features)
    if not words:
        raise DataError(f"no words in the text {quote(text)}")
    labels = openjtalk().make_label(features)
    voices = tuple(str(voice.path) for voice in speaker.voices)
    hts = engine(voices)
    frames = hts.durations(labels, speaker.style)
    line = Line(
        labels=tuple(labels),
        voices=voices,
        digests=tuple(voice.digest for voice in speaker.voices),
        style=speaker.style,
        lead=max(0, frames[0] - rng.randint(12, 50)),
        tail=max(0, frames[-1] - rng.randint(12, 50)),
        level_db=round(rng.uniform(-32, -20), 1),
        snr_db=round(rng.uniform(*config.snr_db), 1),
        tilt=round(rng.uniform(0, 1), 2),
        noise=rng.getrandbits(32),
    )
    frames = [frames[0] - line.lead, *frames[1:-1], frames[-1] - line.tail]
    frame_samples, remainder = divmod(hts.frame_samples * SAMPLE_RATE, hts.sample_rate)
    if remainder:
        raise JahubertError(f"voice {voices[0]}: a frame is not a whole number of samples at 16 kHz")
    samples = [n * frame_samples for n in frames]
    item = Utterance(
        id="",
        audio=AudioSource(str(line.path(work))),
        n_samples=sum(samples),
        speaker=speaker.name,
        text=text,
        words=tuple(word.phones for word in words),
        alignment=demo.align(words, labels, samples),
    )
    return line, item


def _n_processes(config: Config) -> int:
    return config.processes or min(8, usable_cores())


# --- texts ----------------------------------------------------------------------------------------------


def read_sentences(path: Path) -> list[str]:
    """Read sentences from a `.tsv` with a column `text`, or from a file with one sentence per line.

    If a line has the format of ROHAN4600, ID:漢字(かんじ),カナ, its text without furigana is used.

    Raises:
        DataError: the file is missing or not UTF-8, or the table has no column `text`.
    """
    file = io.StringIO(read_text(path), newline="")
    if path.suffix == ".tsv":
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if "text" not in (table.fieldnames or ()):
            found = ", ".join(table.fieldnames or ()) or "no columns"
            raise DataError(f"{path}: no column text; found {found}")
        lines = [row["text"] or "" for row in table]
    else:
        lines = [line.strip() for line in file]
    return [_text_of(line) for line in lines if line]


def _text_of(line: str) -> str:
    match = _CORPUS_LINE.fullmatch(line)
    return _FURIGANA.sub("", match["text"]) if match else line


def excluded_sentences(config: Config) -> set[str]:
    """Read the files in `config.exclude`, and return the letters and digits of each sentence."""
    files = map(expand_user, config.exclude)
    return {recognized_characters(text) for file in files for text in read_sentences(file)}


def _phrases(texts: Iterable[str], seen: set[str]) -> Iterator[tuple[str, list[list[tuple[str, ...]]]]]:
    """Yield texts that are not in `seen`, each with the words in its parts between punctuation marks.

    A text with a part that has no reading is skipped.
    """
    for text in texts:
        if (characters := recognized_characters(text)) in seen:
            continue
        seen.add(characters)
        parts = [part for part in _PUNCTUATION.split(text) if recognized_characters(part)]
        try:
            phrases = [[word.phones for word in features_to_words(analyze(part))] for part in parts]
        except DataError:
            continue
        if phrases and all(phrases):
            yield text, phrases


def _mix(given: Sequence[str], own_share: float, seed: int) -> Iterator[str]:
    """Yield each given sentence once, randomly mixed with sentences from the demo recipe.

    Unless `own_share` is 0, the iterator never ends, because the demo recipe generates sentences endlessly.
    """
    rng = random.Random(f"texts {seed}")
    own = demo.sentences(seed) if own_share > 0 else iter(())
    remaining = iter(given)
    while True:
        first, second = (own, remaining) if rng.random() < own_share else (remaining, own)
        text = next(first, None) or next(second, None)
        if text is None:
            return
        yield text
