"""Reader for corpora prepared with fairseq's HuBERT recipe, in which each `.tsv` file is a split."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jahubert.errors import DataError
from jahubert.train.data.fairseq_files import find_tsv_files, read_tsv
from jahubert.train.data.manifest import Rejected, Utterance


@dataclass(frozen=True)
class Config:
    root: str | None = None  # folder of the audio, which replaces the first line of each .tsv


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    if data is None:
        raise DataError(
            "data= is required: the fairseq recipe needs data=FOLDER with fairseq's train.tsv and valid.tsv"
        )
    for tsv in find_tsv_files(data):
        for entry in read_tsv(tsv, config.root):
            # The length in the .tsv is not used, because units are later checked against the measured length.
            yield Utterance(entry.id, entry.audio, split=tsv.stem)
