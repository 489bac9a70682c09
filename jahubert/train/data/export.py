"""Export of a prepared corpus for Kaldi and ESPnet, lhotse and icefall, and Hugging Face datasets.

Each split contains the same utterances as in the manifest, so that results are comparable. Kaldi data
directories and lhotse manifests refer to an original audio file if it is 16 kHz mono and not inside an
archive. Otherwise, the utterance is written to a 16 kHz FLAC file. An export for Hugging Face datasets
always writes FLAC files.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import soundfile

from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_path, atomic_write, new_folder
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.flac import write_flac
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.utterances import Utterance
from jahubert.train.experiment.progress import progress


def export_corpus(manifest: Manifest, folder: Path, kind: str) -> dict[str, int]:
    """Export a corpus, and return the number of utterances per split.

    Args:
        kind: the format, one of kaldi, lhotse and datasets.

    Raises:
        ConfigError: `folder` exists and is not empty.
        DataError: `kind` is unknown, the format cannot represent an utterance, or reading a file still fails
            after several attempts.
        AudioError: the audio of an utterance is missing or unusable.
    """
    if kind not in WRITERS:
        raise DataError(f"unknown corpus format {kind}; expected one of {', '.join(WRITERS)}")
    counts = {}
    with new_folder(folder):
        for split in manifest.counts["splits"]:
            if Path(split).name != split:
                raise DataError(f"split {quote(split)}: cannot be used as the name of a file or folder")
            rows = manifest.indices(split=split).tolist()
            WRITERS[kind](manifest, rows, folder, split)
            counts[split] = len(rows)
    return counts


def _utterances(manifest: Manifest, rows: list[int], name: str) -> Iterator[tuple[int, Utterance]]:
    with progress(f"exporting {name}", "utterances", len(rows)) as done:
        for row in rows:
            yield row, manifest[row]
            done(1)


def _phones(item: Utterance) -> str:
    return " | ".join(" ".join(word) for word in item.words)


# --- Kaldi ------------------------------------------------------------------------------------------------


def _write_kaldi(manifest: Manifest, rows: list[int], folder: Path, split: str) -> None:
    """Write a Kaldi data directory: wav.scp, segments, text, text.phn (phones), utt2spk and spk2utt."""
    target = folder / split
    target.mkdir(exist_ok=True)
    files: dict[str, list[str]] = {name: [] for name in ("segments", "text", "text.phn", "utt2spk")}
    recordings: dict[Path, str] = {}
    utterances: dict[str, list[str]] = {}
    ids: set[str] = set()
    for row, item in _utterances(manifest, rows, split):
        speaker = _kaldi_id(item.speaker or item.id, item)
        # In Kaldi, sorting by utterance id must also sort by speaker id.
        id = _kaldi_id(item.id, item)
        id = id if id == speaker or id.startswith(f"{speaker}-") else f"{speaker}-{id}"
        _check_unique(id, ids, item)
        path, first, _ = _audio_file(manifest, row, target / "audio")
        recording = recordings.setdefault(path, f"rec-{len(recordings):07d}")
        start, end = first / SAMPLE_RATE, (first + item.n_samples) / SAMPLE_RATE
        files["segments"].append(f"{id} {recording} {start:.6f} {end:.6f}")
        files["utt2spk"].append(f"{id} {speaker}")
        utterances.setdefault(speaker, []).append(id)
        if item.text or item.words:
            files["text"].append(f"{id} {' '.join(item.text.split()) or _phones(item)}")
        if item.words:
            files["text.phn"].append(f"{id} {_phones(item)}")
    _check_speaker_order(files["utt2spk"], split)
    files["wav.scp"] = [f"{recording} {path}" for path, recording in recordings.items()]
    files["spk2utt"] = [f"{speaker} {' '.join(sorted(ids))}" for speaker, ids in utterances.items()]
    for name, lines in files.items():
        with atomic_write(target / name) as file:
            # Kaldi requires files to be sorted by byte value, as with `LC_ALL=C sort`.
            file.writelines(f"{line}\n" for line in sorted(lines, key=str.encode))


def _check_speaker_order(utt2spk: list[str], split: str) -> None:
    """Raise DataError if the order of the ids is not that of the speakers, as for the speakers A and A-B."""
    speakers = [line.split()[1] for line in sorted(utt2spk, key=str.encode)]
    for first, second in itertools.pairwise(speakers):
        if first.encode() > second.encode():
            raise DataError(
                f"split {split}: Kaldi needs utterance ids whose order is also that of the speakers, which "
                f"is not possible for the speakers {quote(second)} and {quote(first)}; rename one of them, "
                "for example with _ instead of -"
            )


def _kaldi_id(name: str, item: Utterance) -> str:
    if not name or any(char.isspace() for char in name):
        raise DataError(
            f"utterance {quote(item.id)}: Kaldi ids must not contain white space; found {quote(name)}"
        )
    return name.replace("/", "-")


# --- lhotse -----------------------------------------------------------------------------------------------


def _write_lhotse(manifest: Manifest, rows: list[int], folder: Path, split: str) -> None:
    """Write the lhotse cut manifest `cuts_<split>.jsonl.gz`, with one supervision per cut."""
    with (
        atomic_path(folder / f"cuts_{split}.jsonl.gz") as temporary,
        gzip.open(temporary, "wt", encoding="utf-8") as file,
    ):
        names: set[str] = set()
        for row, item in _utterances(manifest, rows, split):
            _check_unique(_file_name(item), names, item)
            cut = _cut(item, *_audio_file(manifest, row, folder / "audio" / split))
            file.write(json.dumps(cut, ensure_ascii=False) + "\n")


def _cut(item: Utterance, path: Path, first: int, n_samples: int) -> dict[str, Any]:
    start, duration = first / SAMPLE_RATE, item.n_samples / SAMPLE_RATE
    recording: dict[str, Any] = {
        "id": _recording_id(path),
        "sources": [{"type": "file", "channels": [0], "source": str(path)}],
        "sampling_rate": SAMPLE_RATE,
        "num_samples": n_samples,
        "duration": n_samples / SAMPLE_RATE,
        "channel_ids": [0],
    }
    supervision = {
        "id": item.id,
        "recording_id": recording["id"],
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": item.text or _phones(item),
        "language": "Japanese",
        "speaker": item.speaker or None,
        "custom": {"phones": _phones(item)},
    }
    return {
        "id": item.id,
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "custom": {"split": item.split},
        "type": "MonoCut",
    }


def _recording_id(path: Path) -> str:
    """Return the stem of a file and a hash of its path, because stems need not be unique in a corpus."""
    return f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


# --- Hugging Face datasets ----------------------------------------------------------------------------------


def _write_datasets(manifest: Manifest, rows: list[int], folder: Path, split: str) -> None:
    """Write a Hugging Face audio folder: <split>/metadata.jsonl and one FLAC file per utterance."""
    target = folder / split
    target.mkdir(exist_ok=True)
    with atomic_write(target / "metadata.jsonl") as file:
        names: set[str] = set()
        for row, item in _utterances(manifest, rows, split):
            name = _file_name(item)
            _check_unique(name, names, item)
            write_flac(target / name, manifest.load(row).numpy())
            record = {"file_name": name, "id": item.id, "text": item.text, "phones": _phones(item)}
            file.write(json.dumps(record | {"speaker": item.speaker}, ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[Manifest, list[int], Path, str], None]] = {
    "kaldi": _write_kaldi,
    "lhotse": _write_lhotse,
    "datasets": _write_datasets,
}


def _file_name(item: Utterance) -> str:
    return item.id.replace("/", "-") + ".flac"


def _check_unique(name: str, names: set[str], item: Utterance) -> None:
    """Add a name to `names`. Raise DataError if it is taken, e.g. because two ids differ only in / and -."""
    if name in names:
        raise DataError(
            f"utterance {quote(item.id)}: another utterance is exported as {name} too; rename one of them"
        )
    names.add(name)


def _audio_file(manifest: Manifest, row: int, folder: Path) -> tuple[Path, int, int]:
    """Return a 16 kHz mono file that contains an utterance: the original, or a new one in `folder`.

    Returns:
        The path, the position of the first sample in the file, and the number of samples in the file.
    """
    item = manifest[row]
    if item.audio.offset == 0 and item.audio.length < 0:
        path = Path(item.audio.path)
        length = _length_if_16khz_mono(path)
        if length is not None and length >= item.start + item.n_samples:
            return path, item.start, length
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / _file_name(item)
    write_flac(path, manifest.load(row).numpy())
    return path, 0, item.n_samples


@lru_cache(maxsize=1)  # the utterances of a recording are consecutive
def _length_if_16khz_mono(path: Path) -> int | None:
    """Return the number of samples in a file if soundfile reads it as 16 kHz mono, otherwise None."""
    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError):
        return None
    return info.frames if (info.samplerate, info.channels) == (SAMPLE_RATE, 1) else None
