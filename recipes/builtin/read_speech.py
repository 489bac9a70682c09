"""Reader for recordings from Common Voice: sentences with speaker labels, and recordings without text.

Each input is a folder with a tab-separated table: `transcripts.tsv` with the columns file, text and speaker,
or `clips.tsv` with the columns file and speaker. Sentences may also be a release of Common Voice, as read by
the `table` recipe; its splits are ignored. Recordings are converted to 16 kHz FLAC files.

The splits train, dev_cv and test_cv share neither speakers nor sentences. Sentences that differ only in
punctuation or character widths count as equal. The speakers of test_cv and dev_cv are drawn at random,
determined by the seed, from those with a client id and 5 to 70 recordings. A speaker label that starts with
`block` is not a client id, but was guessed from neighboring file names.

Each utterance of test_cv has two copies with the same text: one over a simulated telephone line (`telephone`)
in test_cv_phone, and one with pink noise (`noisy`) in test_cv_noise. The training augmentation has similar
effects, but shares no code with these functions, so changes to the augmentation do not affect the test sets.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from jahubert.audio import AudioSource, load_audio
from jahubert.errors import AudioError, ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.data.augmentation import change_speed
from jahubert.train.data.flac import write_flac_once
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, is_file, read_reliably, read_text
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.text.normalization import recognized_characters

table_sources = recipe_module("table", "table_sources")
SENTENCES = "transcripts.tsv"  # table of the sentences of a folder that is not a Common Voice release
_FEWEST_CLIPS, _MOST_CLIPS = 5, 70  # limits on the number of clips per speaker in held-out splits


@dataclass(frozen=True)
class Config:
    test_speakers: int = 12
    dev_speakers: int = 6
    cap_minutes: float = 20.0  # maximum duration of the recordings of a training speaker
    speeds: tuple[float, ...] = (0.9, 1.1)  # speeds at which every training sentence is repeated
    snr_db: float = 10.0  # signal-to-noise ratio of test_cv_noise in dB

    def __post_init__(self) -> None:
        if self.test_speakers < 1 or self.dev_speakers < 1:
            raise ConfigError(
                f"test_speakers and dev_speakers must be at least 1; found {self.test_speakers} and "
                f"{self.dev_speakers}"
            )
        if self.cap_minutes <= 0:
            raise ConfigError(f"cap_minutes must be positive; found {self.cap_minutes}")
        if not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ConfigError(f"speeds must be between 0.5 and 2; found {self.speeds}")


def sentences(
    folder: Path, work: Path, config: Config, seed: int, held_out: Collection[str]
) -> Iterator[Utterance | Rejected]:
    """Yield the utterances of train, dev_cv, test_cv, test_cv_phone and test_cv_noise, and rejected items.

    Args:
        folder: folder that contains `transcripts.tsv`, or a Common Voice release.
        work: folder for the converted recordings. Existing files are kept.
        held_out: sentences in other test sets, which are excluded from training and development.

    Raises:
        DataError: no table is found, `transcripts.tsv` is not UTF-8 or has a row without file, text or
            speaker, or there are too few speakers.
    """
    rows, rejected = _read_sentences(folder)
    yield from rejected
    split_of = _split_speakers(rows, config, seed)
    texts: dict[str, set[str]] = {"train": set(), "dev_cv": set(), "test_cv": set()}
    for row in rows:
        texts[split_of[row["speaker"]]].add(recognized_characters(row["text"]))
    tested = texts["test_cv"].union(map(recognized_characters, held_out))
    usable = []
    for row in rows:
        split, text = split_of[row["speaker"]], recognized_characters(row["text"])
        if split != "test_cv" and text in tested:
            yield Rejected(_id("cv", row), "sentence of a test set")
        elif split == "train" and text in texts["dev_cv"]:
            yield Rejected(_id("cv", row), "sentence of the development set")
        else:
            usable.append(row)
    random.Random(f"common voice order {seed}").shuffle(usable)
    used: Counter[str] = Counter()
    for row, item in _converted(folder, usable, work / "sentences", "cv"):
        if isinstance(item, Rejected):
            yield item
            continue
        split = split_of[row["speaker"]]
        item = replace(item, text=row["text"], split=split)
        if split == "train":
            used[row["speaker"]] += item.n_samples
            if used[row["speaker"]] > config.cap_minutes * 60 * SAMPLE_RATE:
                yield Rejected(item.id, "more than cap_minutes of one speaker")
                continue
        yield item
        if split == "train":
            yield from (at_speed(item, speed, work / "speeds") for speed in config.speeds)
        if split == "test_cv":
            yield _copy(item, "test_cv_phone", work / "phone", lambda wave_T, _: telephone(wave_T))
            yield _copy(item, "test_cv_noise", work / "noise", partial(noisy, snr_db=config.snr_db))


def other_languages(folder: Path, work: Path) -> Iterator[Utterance | Rejected]:
    """Yield recordings without text for pretraining, all in the `train` split, and rejected recordings."""
    rows = read_rows(folder / "clips.tsv", ("file", "speaker"))
    for _, item in _converted(folder, rows, work / "other", "other"):
        yield item if isinstance(item, Rejected) else replace(item, split="train")


def at_speed(item: Utterance, speed: float, folder: Path) -> Utterance:
    """Return a copy of an utterance played faster or slower, which also shifts pitch and formants."""
    path = folder / f"{Path(item.audio.path).stem}-{speed}.flac"
    n_samples = write_flac_once(path, lambda: change_speed(_read(item), speed))
    return replace(item, id=f"{item.id}-{speed}", audio=AudioSource(str(path)), n_samples=n_samples)


def telephone(wave_T: np.ndarray) -> np.ndarray:
    """Simulate the public telephone network: 300 to 3400 Hz, and 8-bit mu-law coding similar to ITU-T G.711.

    The band has linear slopes from 200 to 300 and from 3400 to 3600 Hz. The peak is set to half of full scale
    before coding.

    Args:
        wave_T: float32 (T,) at 16 kHz.

    Returns:
        float32 (T,) at 16 kHz, aligned with the input.
    """
    spectrum = np.fft.rfft(wave_T)
    hertz = np.fft.rfftfreq(len(wave_T), 1 / SAMPLE_RATE)
    inside = np.clip((hertz - 200) / 100, 0, 1) * np.clip((3600 - hertz) / 200, 0, 1)
    band_T = np.fft.irfft(spectrum * inside, len(wave_T))
    band_T = 0.5 * band_T / max(1e-9, float(np.abs(band_T).max()))
    code_T = np.round(127 * np.sign(band_T) * np.log1p(255 * np.abs(band_T)) / np.log(256)) / 127
    return (np.sign(code_T) * np.expm1(np.abs(code_T) * np.log(256)) / 255).astype(np.float32)


def noisy(wave_T: np.ndarray, rng: np.random.Generator, snr_db: float) -> np.ndarray:
    """Add pink noise at a signal-to-noise ratio (dB) that is measured over the whole utterance.

    Args:
        wave_T: float32 (T,) at 16 kHz.
        rng: random number generator for the noise.
        snr_db: signal-to-noise ratio.

    Returns:
        float32 (T,), scaled down if its peak would exceed 0.99 of full scale.
    """
    spectrum = np.fft.rfft(rng.standard_normal(len(wave_T)))
    spectrum /= np.sqrt(np.maximum(1.0, np.arange(len(spectrum))))
    noise_T = np.fft.irfft(spectrum, len(wave_T))
    scale = np.sqrt(np.mean(wave_T**2) / np.mean(noise_T**2)) * 10 ** (-snr_db / 20)
    mixed_T = wave_T + scale * noise_T
    return (mixed_T * min(1.0, 0.99 / float(np.abs(mixed_T).max()))).astype(np.float32)


def read_rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a tab-separated table.

    Returns:
        The columns of each row and, if `columns` contains file, a unique `name`: the stem of the file, with a
        hash of its path if several files have this stem.

    Raises:
        DataError: the table was not found or is not UTF-8, or a row has no value in one of `columns`.
    """
    if not is_file(table):
        raise DataError(f"{table}: file not found; expected a table with the columns {', '.join(columns)}")
    lines = io.StringIO(read_text(table), newline="")
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows, start=2):
        if missing := [column for column in columns if not row.get(column)]:
            raise DataError(f"{table}:{number}: no value for {' and '.join(missing)}; found {row}")
    if "file" in columns:
        _add_names(rows)
    return rows


def _add_names(rows: list[dict[str, str]]) -> None:
    """Add a unique `name` to each row: the stem of its file, with a hash of the path if it is not unique."""
    stems = Counter(Path(row["file"]).stem for row in rows)
    for row in rows:
        stem = row["name"] = Path(row["file"]).stem
        if stems[stem] > 1:
            row["name"] = f"{stem}-{hashlib.sha256(row['file'].encode()).hexdigest()[:8]}"


def _read_sentences(folder: Path) -> tuple[list[dict[str, str]], list[Rejected]]:
    """Read the sentences of a folder with `transcripts.tsv` or of a Common Voice release.

    Returns:
        Rows with file, text, speaker and a unique `name` (see `read_rows`), and rejected lines of a release.
    """
    items = [] if is_file(folder / SENTENCES) else list(table_sources.read_common_voice(folder))
    if not items:
        return read_rows(folder / SENTENCES, ("file", "text", "speaker")), []
    rows, rejected = [], []
    for item in items:
        if isinstance(item, Rejected):
            rejected.append(item)
        elif item.text and item.speaker:
            file = os.path.relpath(item.path, folder)
            rows.append({"file": file, "text": item.text, "speaker": item.speaker})
        else:
            rejected.append(Rejected(item.where, "no text or speaker"))
    _add_names(rows)
    return rows, rejected


def _split_speakers(rows: list[dict[str, str]], config: Config, seed: int) -> dict[str, str]:
    """Assign every speaker to a split."""
    clips = Counter(row["speaker"] for row in rows)
    candidates = sorted(
        speaker
        for speaker, count in clips.items()
        if _FEWEST_CLIPS <= count <= _MOST_CLIPS and not speaker.startswith("block")
    )
    wanted = config.test_speakers + config.dev_speakers
    if len(candidates) < wanted:
        raise DataError(
            f"test_speakers + dev_speakers must be at most {len(candidates)}, the number of speakers with a "
            f"client id and {_FEWEST_CLIPS} to {_MOST_CLIPS} recordings; found {wanted}"
        )
    drawn = random.Random(f"common voice speakers {seed}").sample(candidates, wanted)
    splits = dict.fromkeys(clips, "train")
    splits |= dict.fromkeys(drawn[: config.test_speakers], "test_cv")
    return splits | dict.fromkeys(drawn[config.test_speakers :], "dev_cv")


def _id(prefix: str, row: dict[str, str]) -> str:
    return f"{prefix}-{row['name']}"


def _converted(
    folder: Path, rows: list[dict[str, str]], work: Path, prefix: str
) -> Iterator[tuple[dict[str, str], Utterance | Rejected]]:
    """Yield the rows of a table with their recordings, converted to 16 kHz FLAC files."""

    def convert(row: dict[str, str]) -> Utterance | Rejected:
        source, id = folder / row["file"], _id(prefix, row)
        path = work / f"{row['name']}.flac"
        try:
            n_samples = write_flac_once(
                path, lambda: read_reliably(lambda: load_audio(source), source).numpy()
            )
        except AudioError as error:
            return Rejected(id, UNUSABLE_AUDIO, str(error))
        return Utterance(
            id=id, audio=AudioSource(str(path)), n_samples=n_samples, speaker=row["speaker"], split=""
        )

    return prefetch(convert, rows)


def _copy(
    item: Utterance, split: str, folder: Path, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> Utterance:
    """Return a copy of a test utterance with changed audio.

    The random numbers that `change` receives depend only on the id of the utterance.
    """
    rng = np.random.default_rng(list(item.id.encode()))
    path = folder / Path(item.audio.path).name
    n_samples = write_flac_once(path, lambda: change(_read(item), rng))
    return replace(
        item, id=f"{split}-{item.id}", audio=AudioSource(str(path)), n_samples=n_samples, split=split
    )


def _read(item: Utterance) -> np.ndarray:
    return soundfile.read(item.audio.path, dtype="float32")[0]
