"""Reader for your own recordings: tables, corpus folders, and manifests from other toolkits.

`data` is a csv, tsv, jsonl or parquet file, a Common Voice release, a Kaldi data directory, an ESPnet dump, a
lhotse cut manifest, or a folder of audio files with .txt or .lab files (table_sources.py). If the input
has no dev or test split, some training speakers are assigned to the missing split.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pauses import cut_at_pauses
from recordings import Recording, read_recordings
from table_sources import Row, normalize_split, read_rows, unique_ids

from jahubert.audio import AudioSource
from jahubert.errors import AudioError, ConfigError, DataError, quote
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import kana_to_phones, normalize_kana_words
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, is_file, is_folder, read_reliably, too_many

log = logging.getLogger(__name__)

_TOLERANCE = SAMPLE_RATE // 10  # maximum excess of an end time over the length, in samples


@dataclass(frozen=True)
class Config:
    dev_share: float = 0.1  # fraction of the training utterances to use as dev, if the input has no dev split
    # Fraction of the training utterances to use as test, if the input has only train and dev splits.
    test_share: float = 0.1
    # Maximum length of an utterance in seconds. A longer recording is cut at pauses if it has no text. A
    # longer recording with text is rejected, because its words cannot be assigned to the parts.
    max_seconds: float = 30.0
    # Maximum share of rejected rows. The run ends if a larger share is rejected or if no row is left. A
    # single rejected row is accepted, unless max_rejected is 0.
    max_rejected: float = 0.2

    def __post_init__(self) -> None:
        if min(self.dev_share, self.test_share) <= 0 or self.dev_share + self.test_share >= 1:
            raise ConfigError(
                "dev_share and test_share must be above 0 and add up to less than 1; found "
                f"{self.dev_share} and {self.test_share}"
            )
        if self.max_seconds < 1:
            raise ConfigError(f"max_seconds must be at least 1; found {self.max_seconds}")
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(f"max_rejected must be in [0, 1]; found {self.max_rejected}")

    @property
    def max_samples(self) -> int:
        """Maximum length of an utterance in 16 kHz samples."""
        return round(self.max_seconds * SAMPLE_RATE)


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield the utterances in the input and the rejected rows, and log the size of each split.

    Raises:
        DataError: the input is missing, unsupported or malformed, or too many rows are rejected.
    """
    if data is None:
        raise DataError("data= is required: the table recipe needs data=PATH of a table or a corpus folder")
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for item in (checked for row in read_rows(data, work) for checked in _check(row)):
        rejected.append(item) if isinstance(item, Rejected) else rows.append(item)
    root = data if is_folder(data) else data.parent
    id_of = unique_ids(rows, root)
    rows = sorted((replace(row, id=id_of(row)) for row in rows), key=lambda row: row.id)
    rows, duplicates = _split_duplicates(rows)
    rejected += duplicates
    _check_share(data, rejected, len(rows), config)
    yield from rejected
    splits = _assign_splits(rows, config, seed)
    recordings = read_recordings(rows, config.max_samples, work / "converted")
    counts: dict[str, Counter[str]] = {}
    n_usable = len(rows)
    for row, split in zip(rows, splits, strict=True):
        for item in _utterances(row, split, recordings[row.path], config):
            if isinstance(item, Rejected):
                rejected.append(item)
                n_usable -= 1
            else:
                count = counts.setdefault(split, Counter())
                count.update(utterances=1, samples=item.n_samples, labeled=bool(item.text or item.words))
            yield item
    _check_share(data, rejected, n_usable, config)
    _log_report(counts, rejected, rows, splits)


def _check_share(data: Path, rejected: Sequence[Rejected], n_usable: int, config: Config) -> None:
    """Raise DataError if too many rows are rejected, or if no row is left."""
    if not n_usable and not rejected:
        raise DataError(f"{data}: no rows found")
    if n_usable and not too_many(len(rejected), n_usable + len(rejected), config.max_rejected):
        return
    reasons = Counter(item.reason for item in rejected)
    counted = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
    remedy = "fix the input"
    if n_usable:
        limit = f"prepare.options.max_rejected (now {config.max_rejected:g})"
        remedy += f", or increase {limit} to leave these rows out"
    raise DataError(
        f"{data}: unusable rows: {len(rejected)} of {n_usable + len(rejected)} ({counted}); first problem: "
        f"{rejected[0].detail or rejected[0].id}; {remedy}"
    )


def _check(row: Row | Rejected) -> Iterator[Row | Rejected]:
    if isinstance(row, Rejected):
        yield row
    elif not is_file(row.path):
        yield Rejected(row.id or row.where, "audio file not found", f"{row.where}: {row.path}")
    elif row.start < 0 or (row.end is not None and row.end <= row.start):
        times = f"start {row.start:g} s" + ("" if row.end is None else f", end {row.end:g} s")
        yield Rejected(row.id or row.where, "negative start, or end not after start", f"{row.where}: {times}")
    else:
        yield replace(row, split=normalize_split(row.split))


def _split_duplicates(rows: Sequence[Row]) -> tuple[list[Row], list[Rejected]]:
    first: dict[str, Row] = {}
    duplicates = []
    for row in rows:
        if row.id in first:
            detail = f"{row.where}: id {quote(row.id)} already occurs at {first[row.id].where}"
            duplicates.append(Rejected(row.id, "duplicate id", detail))
        else:
            first[row.id] = row
    return list(first.values()), duplicates


def _assign_splits(rows: Sequence[Row], config: Config, seed: int) -> list[str]:
    """Return the split of each row. A missing test or dev split is formed from training data by speaker.

    Speakers are drawn at random. A speaker who would make a split more than twice as large as requested is
    skipped. If this is true of every remaining speaker, the one with the fewest utterances is used. If there
    are too few speakers, single utterances are assigned instead.
    """
    splits = [row.split or "train" for row in rows]
    shares = {"test": config.test_share, "dev": config.dev_share}
    if set(splits) - {"train", "dev"}:  # every other split counts as a test set
        del shares["test"]
    missing = {split: share for split, share in shares.items() if split not in splits}
    train = [i for i, split in enumerate(splits) if split == "train"]
    if not missing or not train:
        return splits
    groups = {i: rows[i].speaker for i in train}
    n_speakers = len(set(groups.values()))
    if n_speakers <= len(missing):
        log.warning(
            "table: too few speakers (%d) to split by speaker; the utterances of %s are drawn at random, so "
            "error rates will not measure accuracy on unseen speakers",
            n_speakers if any(groups.values()) else 0,
            " and ".join(missing),
        )
        groups = {i: rows[i].id for i in train}
    sizes = Counter(groups.values())
    order = sorted(sizes)
    random.Random(f"splits {seed}").shuffle(order)
    split_of = dict.fromkeys(order, "train")
    for split, share in missing.items():
        n, n_wanted = 0, share * len(train)
        while n < n_wanted and len(order) > 1:
            fitting = (group for group in order if n + sizes[group] <= 2 * n_wanted)
            group = next(fitting, min(order, key=lambda group: sizes[group]))
            order.remove(group)
            split_of[group] = split
            n += sizes[group]
    for i in train:
        splits[i] = split_of[groups[i]]
    return splits


def _utterances(
    row: Row, split: str, recording: Recording | str, config: Config
) -> Iterator[Utterance | Rejected]:
    if isinstance(recording, str):
        yield Rejected(row.id, UNUSABLE_AUDIO, f"{row.where}: {recording}")
        return
    length = recording.n_samples
    start = round(row.start * SAMPLE_RATE)
    end = length if row.end is None else round(row.end * SAMPLE_RATE)
    if end > length + _TOLERANCE or start >= length:
        seconds = length / SAMPLE_RATE
        detail = (
            f"{row.where}: {row.start:g} to {end / SAMPLE_RATE:g} s, but the audio is {seconds:.3f} s long"
        )
        yield Rejected(row.id, "time after the end of the audio", detail)
        return
    end = min(end, length)
    try:
        spoken = normalize_kana_words(row.kana.split(), row.text)
        words = tuple(tuple(kana_to_phones(word)) for word in spoken)
    except DataError as error:
        yield Rejected(row.id, "invalid kana", f"{row.where}: {error}")
        return
    item = Utterance(
        id=row.id,
        audio=AudioSource(str(recording.path)),
        start=start,
        n_samples=end - start,
        speaker=row.speaker,
        text=row.text or row.kana,
        words=words,
        split=split,
    )
    if item.n_samples <= config.max_samples:
        yield item
    elif item.text:
        seconds = item.n_samples / SAMPLE_RATE
        detail = f"{row.where}: {seconds:.1f} s; cut it, or increase prepare.options.max_seconds"
        yield Rejected(row.id, "text for a recording longer than max_seconds", detail)
    else:
        try:
            parts = read_reliably(
                lambda: list(cut_at_pauses(item.audio, start, end, config.max_samples)), item.audio
            )
        except AudioError as error:
            yield Rejected(row.id, UNUSABLE_AUDIO, f"{row.where}: {error}")
            return
        for number, (first, last) in enumerate(parts):
            yield replace(item, id=f"{row.id}-{number:04d}", start=first, n_samples=last - first)


def _log_report(
    counts: dict[str, Counter[str]], rejected: Sequence[Rejected], rows: Sequence[Row], splits: Sequence[str]
) -> None:
    speakers_of: dict[str, set[str]] = {}
    for row, split in zip(rows, splits, strict=True):
        speakers_of.setdefault(split, set()).update({row.speaker} - {""})
    for split, count in sorted(counts.items()):
        log.info(
            "table %s: utterances: %d (with text: %d), %.2f h, speakers: %d",
            split,
            count["utterances"],
            count["labeled"],
            count["samples"] / SAMPLE_RATE / 3600,
            len(speakers_of[split]),
        )
    if "train" not in counts:
        log.warning(
            "table: no utterance is in the split train, so there is nothing to train on; splits found: %s",
            ", ".join(sorted(counts)),
        )
    training_speakers = speakers_of.pop("train", set())
    if shared := training_speakers & set().union(*speakers_of.values()):
        log.warning(
            "table: number of speakers who are both in train and in another split: %d; error rates will not "
            "measure accuracy on unseen speakers",
            len(shared),
        )
    for reason, n in Counter(item.reason for item in rejected).most_common():
        log.warning("table rejected, %s: %d", reason, n)
    if characters := {character for row in rows for character in row.text}:
        log.info("table: number of different characters in the text: %d", len(characters))
