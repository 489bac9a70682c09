"""Reader for recorded words by two native speakers of Japanese, single and joined into longer utterances.

The recipe reads `lib/ogg/<surface>【<reading>】.ogg` from a clone of the GitHub repository
tofugu/japanese-vocabulary-pronunciation-audio (CC BY-SA 4.0, Tofugu and WaniKani). Phones are derived from
the reading. Each reading is in only one of the splits train, dev and test. Joined utterances have known word
boundaries. They are in the splits train, dev_joined and test_joined. The last two consist of the words in dev
and test. `speaker` is empty, because the files do not identify the speaker.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from jahubert.audio import AudioSource, load_audio
from jahubert.audio.search import is_sidecar
from jahubert.errors import AudioError, ConfigError, DataError
from jahubert.formats.atomic import atomic_write
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import kana_to_phones, normalize_kana
from jahubert.prefetch import prefetch
from jahubert.train.data.flac import write_flac_once
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, is_folder, read_reliably

VERSION = 2  # version of the generated audio, which is part of every file name
_BLOCK = SAMPLE_RATE // 100  # number of samples per level measurement
_QUIET_DB = 45  # blocks at least this many dB below the loudest block are silence
_KEEP = SAMPLE_RATE // 20  # number of samples of silence to keep around a word
_FADE = SAMPLE_RATE // 200  # number of samples for fading in and out, which avoids clicks


@dataclass(frozen=True)
class Config:
    dev_share: float = 0.05  # fraction of the distinct readings in dev
    test_share: float = 0.10  # fraction of the distinct readings in test
    # Maximum number of joined utterances that contain the same training word. 0: no joined training data.
    uses: int = 2
    min_seconds: float = 2.0  # minimum length of a joined utterance
    max_seconds: float = 12.0  # maximum length of a joined utterance


@dataclass(frozen=True)
class _Source:
    path: Path
    surface: str
    phones: tuple[str, ...]


@dataclass(frozen=True)
class _Word:
    path: Path  # 16 kHz FLAC
    surface: str
    phones: tuple[str, ...]
    n_samples: int
    start: int  # first sample of the word with up to 50 ms of silence before it
    end: int  # end of the word with up to 50 ms of silence after it, exclusive


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield the utterances `word-<split>-NNNNN` and `joined-<split>-NNNNN`, and rejected files.

    Training words are randomly divided into ten parts, each of which is followed by its joined utterances.
    The first tenth of the training utterances therefore contains only a tenth of the words, as required for
    training with few labels. Audio is written to `work` as 16 kHz FLAC, and existing files are kept.
    `work/word-times.jsonl` contains the start and end samples of the words in joined utterances.

    Raises:
        DataError: the corpus is not given or not found, or a file cannot be read.
        ConfigError: lengths or shares are inconsistent.
    """
    if not 0 < config.min_seconds * 2 <= config.max_seconds or config.dev_share + config.test_share >= 1:
        raise ConfigError(
            "tofugu: min_seconds must be above 0, max_seconds at least 2 * min_seconds, and dev_share + "
            f"test_share below 1; found {config}"
        )
    parsed = [_parse_name(path) for path in _files(data)]
    yield from (item for item in parsed if isinstance(item, Rejected))
    sources = [item for item in parsed if isinstance(item, _Source)]
    split_of = _split(sources, config, seed)
    words: dict[str, list[_Word]] = {"train": [], "dev": [], "test": []}
    for source, word in prefetch(partial(_decode, folder=work / "words"), sources):
        if isinstance(word, Rejected):
            yield word
        else:
            words[split_of[source.phones]].append(word)
    yield from _utterances(words, work, config, seed)


def _files(data: Path | None) -> list[Path]:
    repository = "the GitHub repository tofugu/japanese-vocabulary-pronunciation-audio"
    if data is None:
        raise DataError(f"data= is required: the tofugu recipe needs data=FOLDER, a clone of {repository}")
    folder = data / "lib" / "ogg" if is_folder(data / "lib" / "ogg") else data
    files = [path for path in folder.glob("*.ogg") if not is_sidecar(path)]
    files.sort(key=lambda path: unicodedata.normalize("NFC", path.name))
    if not files:
        raise DataError(f"{data}: no lib/ogg/*.ogg found; set data= to a clone of {repository}")
    return files


def _parse_name(path: Path) -> _Source | Rejected:
    name = unicodedata.normalize("NFC", path.stem)
    match = re.fullmatch(r"(.+)【(.+)】", name)
    if match is None:
        return Rejected(name, "file name without a reading in 【】")
    try:
        phones = kana_to_phones(normalize_kana(match[2], match[1]))
    except DataError:
        return Rejected(name, "reading that is not kana")
    return _Source(path, match[1], tuple(phones))


def _split(sources: Sequence[_Source], config: Config, seed: int) -> dict[tuple[str, ...], str]:
    """Assign each distinct reading to a split, so that homophones are in the same split."""
    readings = sorted({source.phones for source in sources})
    random.Random(f"split {seed}").shuffle(readings)
    n_test, n_dev = round(len(readings) * config.test_share), round(len(readings) * config.dev_share)
    names = ["test"] * n_test + ["dev"] * n_dev
    return dict(zip(readings, names + ["train"] * (len(readings) - len(names)), strict=True))


# --- single words ---------------------------------------------------------------------------------------


def _decode(source: _Source, folder: Path) -> _Word | Rejected:
    """Convert a word to a 16 kHz file, unless the file exists."""
    name = unicodedata.normalize("NFC", source.path.stem)
    try:
        size = read_reliably(source.path.stat, source.path).st_size
        key = f"{VERSION} {name} {size}"
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.flac"
        write_flac_once(path, lambda: read_reliably(lambda: load_audio(source.path), source.path).numpy())
    except AudioError:
        return Rejected(name, UNUSABLE_AUDIO)
    wave_T = soundfile.read(path, dtype="int16")[0]
    bounds = _speech(wave_T)
    if bounds is None:
        return Rejected(name, "silent audio")
    return _Word(path, source.surface, source.phones, len(wave_T), *bounds)


def _single(word: _Word, split: str, number: int) -> Utterance:
    return Utterance(
        id=f"word-{split}-{number:05d}",
        audio=AudioSource(str(word.path)),
        n_samples=word.n_samples,
        text=word.surface,
        words=(word.phones,),
        split=split,
    )


def _speech(wave_T: np.ndarray) -> tuple[int, int] | None:
    """Return the start and end of a word with some silence around it, or None if there is only silence."""
    n = len(wave_T) // _BLOCK
    level = np.square(wave_T[: n * _BLOCK].reshape(n, _BLOCK).astype(np.float32)).mean(axis=1)
    if n == 0 or level.max() < 100.0:  # corresponds to an RMS of 10 in 16-bit samples, about -70 dBFS
        return None
    loud = np.flatnonzero(level > level.max() * 10 ** (-_QUIET_DB / 10))
    return max(0, int(loud[0]) * _BLOCK - _KEEP), min(len(wave_T), (int(loud[-1]) + 1) * _BLOCK + _KEEP)


# --- joined words ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The parameters of a joined utterance."""

    words: tuple[_Word, ...]
    pauses: tuple[int, ...]  # lengths of the pauses between words in samples
    gains_db: tuple[float, ...]
    noise_db: float
    noise: int  # random seed for the noise

    @property
    def times(self) -> list[tuple[int, int]]:
        """Start and end samples of each word."""
        times, start = [], 0
        for word, pause in zip(self.words, (*self.pauses, 0), strict=True):
            times.append((start, start + word.end - word.start))
            start = times[-1][1] + pause
        return times

    @property
    def n_samples(self) -> int:
        return self.times[-1][1]

    def path(self, folder: Path) -> Path:
        words = [(word.path.name, word.start, word.end) for word in self.words]
        key = json.dumps([VERSION, words, self.pauses, self.gains_db, self.noise_db, self.noise])
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.flac"

    def render(self) -> np.ndarray:
        """Mix the words, faded in and out, with low noise, and return float32 (T,)."""
        rng = np.random.default_rng(self.noise)
        wave_T = rng.standard_normal(self.n_samples, dtype=np.float32) * np.float32(
            10 ** (self.noise_db / 20)
        )
        fade = np.linspace(0, 1, _FADE, dtype=np.float32)
        for word, (start, end), gain in zip(self.words, self.times, self.gains_db, strict=True):
            part = soundfile.read(word.path, dtype="float32")[0][word.start : word.end]
            part[:_FADE] *= fade
            part[-_FADE:] *= fade[::-1]
            wave_T[start:end] += part * np.float32(10 ** (gain / 20))
        return wave_T * np.float32(min(1.0, 0.99 / float(np.abs(wave_T).max())))


def _utterances(words: dict[str, list[_Word]], work: Path, config: Config, seed: int) -> Iterator[Utterance]:
    train = random.Random(f"tenths {seed}").sample(words["train"], len(words["train"]))
    parts = [("dev", words["dev"], 1), ("test", words["test"], 1)]
    parts += [
        ("train", train[i * len(train) // 10 : (i + 1) * len(train) // 10], config.uses) for i in range(10)
    ]
    counts: Counter[str] = Counter()
    folder = work / "joined"
    with atomic_write(work / "word-times.jsonl") as file:
        for number, (name, part, rounds) in enumerate(parts):
            for word in part:
                yield _single(word, name, counts[name])
                counts[name] += 1
            rng = random.Random(f"join {seed} {number}")
            for plan in (plan for _ in range(rounds) for plan in _plans(part, config, rng)):
                split = "train" if name == "train" else f"{name}_joined"
                item = _make(plan, folder, f"joined-{name}-{counts[split + ' joined']:05d}", split)
                counts[split + " joined"] += 1
                file.write(json.dumps({"id": item.id, "words": plan.times}) + "\n")
                yield item


def _make(plan: _Plan, folder: Path, id: str, split: str) -> Utterance:
    path = plan.path(folder)
    write_flac_once(path, plan.render)
    return Utterance(
        id=id,
        audio=AudioSource(str(path)),
        n_samples=plan.n_samples,
        text=" ".join(word.surface for word in plan.words),
        words=tuple(word.phones for word in plan.words),
        split=split,
    )


def _plans(words: Sequence[_Word], config: Config, rng: random.Random) -> Iterator[_Plan]:
    """Yield plans of random lengths within the limits, in which no word occurs twice.

    Words that do not fit into an utterance within the limits are omitted.
    """
    longest, shortest = config.max_seconds * SAMPLE_RATE, config.min_seconds * SAMPLE_RATE
    order = [(word, _pause(rng)) for word in rng.sample(words, len(words))]
    groups: list[list[tuple[_Word, int]]] = []
    target = 0.0
    for item in order:
        if not groups or _length(groups[-1]) >= target or _length([*groups[-1], item]) > longest:
            groups.append([])
            target = rng.uniform(1.2 * shortest, 0.8 * longest)
        groups[-1].append(item)
    if len(groups) > 1 and _length(groups[-1]) < shortest:
        last = groups.pop()
        both = groups.pop() + last
        halves = [both] if _length(both) <= longest else [both[: len(both) // 2], both[len(both) // 2 :]]
        groups.extend(halves)
    for group in groups:
        if shortest <= _length(group) <= longest:
            yield _Plan(
                words=tuple(word for word, _ in group),
                pauses=tuple(pause for _, pause in group[:-1]),
                gains_db=tuple(round(rng.uniform(-4, 2), 1) for _ in group),
                noise_db=round(rng.uniform(-80, -55), 1),
                noise=rng.getrandbits(32),
            )


def _pause(rng: random.Random) -> int:
    """Draw the pause between two words (samples), which is 0 in 30 % of cases, otherwise 0.05 to 0.4 s."""
    return 0 if rng.random() < 0.3 else round(rng.uniform(0.05, 0.4) * SAMPLE_RATE)


def _length(group: Sequence[tuple[_Word, int]]) -> int:
    return sum(word.end - word.start for word, _ in group) + sum(pause for _, pause in group[:-1])
