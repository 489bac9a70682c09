"""Invented ReazonSpeech releases: tables and tar shards, whole and broken; no caption is from the corpus."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
TEXTS = [
    "今日は晴れです。",
    "３時に、始まります",
    "「はい」と言った。",
    "明日はどうですか？",
    "ＮＨＫのニュース",
]


def flac(n_samples: int, rate: int = RATE) -> bytes:
    """A FLAC file of noise."""
    wave = np.random.default_rng(n_samples).standard_normal(n_samples) * 0.1
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def name_of(shard: int, row: int) -> str:
    return f"{shard:03x}/{shard:03x}{hashlib.sha256(f'{shard} {row}'.encode()).hexdigest()[:10]}.flac"


class Release:
    """A release that is written as it is planned: `rows` are name -> (samples, caption), in their order."""

    def __init__(self, root: Path, shards: int = 3, rows: int = 5, dot: bool = False):
        self.root, self.dot = root, dot
        self.rows: dict[str, tuple[int, str]] = {}
        self.members: dict[int, list[tuple[str, bytes]]] = {}
        self.table: list[bytes] = []
        for shard in range(shards):
            self.members[shard] = []
            for row in range(rows):
                n_samples = 4000 + 400 * ((3 * shard + row) % 7)
                self.add(
                    shard, name_of(shard, row), flac(n_samples), TEXTS[(shard + row) % len(TEXTS)], n_samples
                )

    def add(self, shard: int, name: str, content: bytes, text: str | None, n_samples: int = 0) -> None:
        """A member and its row; `n_samples` 0: it is not expected to be usable."""
        self.members.setdefault(shard, []).append((name, content))
        if text is not None:
            self.table.append(f"{name}\t{text}".encode())
            if n_samples:
                self.rows[name] = (n_samples, text)

    def write(self, subset: str = "tiny", end: bytes = b"\n", form: int = tarfile.GNU_FORMAT) -> Path:
        """Write the table and the shards; returns the folder to give as data."""
        (self.root / "tsv").mkdir(parents=True, exist_ok=True)
        (self.root / "data").mkdir(exist_ok=True)
        (self.root / "tsv" / f"{subset}.tsv").write_bytes(b"".join(line + end for line in self.table))
        for shard, members in self.members.items():
            with tarfile.open(self.shard(shard), "w", format=form) as archive:
                folder = tarfile.TarInfo(f"{'./' * self.dot}{shard:03x}")
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
                for name, content in members:
                    info = tarfile.TarInfo("./" * self.dot + name)
                    info.size = len(content)
                    if form == tarfile.PAX_FORMAT:
                        info.mtime = 1.5  # type: ignore[assignment]  # what makes a header of its own
                    archive.addfile(info, io.BytesIO(content))
        return self.root

    def shard(self, shard: int) -> Path:
        return self.root / "data" / f"{shard:03x}.tar"

    def change(self, shard: int, how: Callable[[bytes], bytes]) -> None:
        path = self.shard(shard)
        path.write_bytes(how(path.read_bytes()))


def write_headers(root: Path, shards: int, rows: int) -> Path:
    """A release of any size whose recordings are FLAC headers and nothing else, 1 KiB a row: for indexing."""
    (root / "tsv").mkdir(parents=True)
    (root / "data").mkdir()
    with open(root / "tsv" / "all.tsv", "w", encoding="utf-8") as table:
        for shard in range(shards):
            with open(root / "data" / f"{shard:03x}.tar", "wb") as archive:
                for row in range(rows):
                    name = name_of(shard, row)
                    archive.write(_member(name, 16_000 + row % 160_000))
                    table.write(f"{name}\t{TEXTS[row % len(TEXTS)]}\n")
                archive.write(bytes(1024))
    return root


def _member(name: str, n_samples: int) -> bytes:
    numbers = (RATE << 44) | (15 << 36) | n_samples  # mono, 16 bits
    content = b"fLaC\x80\0\0\x22" + bytes(10) + numbers.to_bytes(8, "big") + bytes(16)
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:148] = b"0000644\0" + b"0000000\0" * 2 + f"{len(content):011o}\0".encode() + b"0" * 11 + b"\0"
    header[148:157] = b"        0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + content.ljust(512, b"\0")
