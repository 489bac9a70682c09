"""Checks of audio containers: sizes in headers, concatenated streams and truncated files.

Decoders rely on headers: they silently accept a file that is shorter than its header states, and ignore audio
beyond the stated length. `split` therefore compares the structure of a file with its size before any
decoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

from jahubert.audio import mpeg
from jahubert.audio.sources import AudioBytes
from jahubert.errors import AudioError

_RIFF = (b"RIFF", b"RIFX", b"RF64", b"BW64")
# Placeholder sizes from programs that cannot seek back to correct them (SoX, arecord and others). Sizes in
# files may differ from these by up to the size of the header.
_PLACEHOLDERS = (0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
_MAX_U32 = 0xFFFFFFFF
_CHUNK = {order: struct.Struct(order + "4sI") for order in "<>"}  # kind and length of a RIFF or AIFF chunk
_CAF_CHUNK = struct.Struct(">4sq")
_MAX_PADDING = 4096  # bytes; longer unknown content after the samples must start with this many zeros
_MAX_CHUNKS = 10_000  # maximum number of chunks before or after the samples; real files have a few
_MAX_FILES = 10_000  # maximum number of concatenated WAV files


@dataclass(frozen=True)
class Part:
    """A separately decoded stream: `prefix`, followed by a byte range of the file."""

    start: int  # start of the byte range
    length: int  # length of the byte range
    prefix: bytes = b""  # corrected or added header
    min_frames: int = 0  # minimum number of samples per channel in an intact part after decoding


def split(source: AudioBytes) -> list[Part]:
    """Return the streams in a file. Most files contain only one.

    Raises:
        AudioError: the file is truncated, its structure is damaged, or unknown content follows its samples.
    """
    name, file, size = source
    whole = [Part(0, size)]
    file.seek(0)
    head = file.read(12)
    magic = head[:4]
    if magic == b"OggS":
        return _split_ogg(file, size, name)
    if magic in _RIFF and head[8:12] == b"WAVE":
        return _split_riff(file, size, name)
    if magic in (b".snd", b"dns.") and len(head) == 12:
        return [_check_au(file, size, name)]
    if magic == b"FORM":
        _check_end(_aiff_end(file, name), size, name)
    elif magic == b"caff":
        _check_end(_caf_end(file, name), size, name)
    elif mpeg.is_mpeg(head):
        streams = mpeg.split(file, name)
        if not streams and head[:3] != b"ID3":  # a tag may also precede other formats
            raise AudioError(f"{name} contains no complete MPEG audio frame: it is truncated or not audio")
        if len(streams) == 1 and streams[0].tagged:
            return [Part(0, size, min_frames=streams[0].min_frames)]
        return [Part(s.start, s.end - s.start, s.prefix, s.min_frames) for s in streams] or whole
    return whole


def _check_end(end: int, size: int, name: str) -> None:
    if end > size:
        raise AudioError(f"{name} is truncated: it has {size} bytes, but its header states {end}")


def _is_placeholder(length: int, header: int) -> bool:
    return any(abs(length - value) <= header for value in _PLACEHOLDERS)


def _chunks(
    file: BinaryIO, position: int, header: struct.Struct, name: str
) -> Iterator[tuple[int, bytes, int]]:
    """Yield (start of the content, kind, length) of each chunk from a position to the end of the file.

    Args:
        header: layout of the kind and the length at the start of a chunk. If the length field has 4 bytes
            (RIFF, AIFF), a padding byte follows chunks of odd length. A negative length ends the iteration.

    Raises:
        AudioError: there are too many chunks, as in a large file of zeros, which would take hours to read.
    """
    is_padded = header.size == 8
    for number in count():
        file.seek(position)
        stored = file.read(header.size)
        if len(stored) < header.size:
            return
        if number == _MAX_CHUNKS:
            raise AudioError(f"{name} is damaged: it has more than {_MAX_CHUNKS} chunks")
        kind, length = header.unpack(stored)
        position += header.size
        yield position, kind, length
        if length < 0:
            return
        position += length + (length & 1 if is_padded else 0)


def _split_riff(file: BinaryIO, size: int, name: str) -> list[Part]:
    """Return one part per WAV file, because several WAV files may be concatenated."""
    parts: list[Part] = []
    start = 0
    while start < size:
        if len(parts) == _MAX_FILES:
            raise AudioError(f"{name} is damaged: it consists of more than {_MAX_FILES} WAV files")
        part, start = _riff_part(file, start, size, name)
        parts.append(part)
    return parts


def _riff_part(file: BinaryIO, start: int, size: int, name: str) -> tuple[Part, int]:
    """Return the WAV file at `start`, and the offset of the next WAV file (`size` if there is none)."""
    file.seek(start)
    magic, riff_size = struct.unpack("4sI", file.read(8))
    order = ">" if magic == b"RIFX" else "<"
    data_size_64 = 0
    for content, kind, n_bytes in _chunks(file, start + 12, _CHUNK[order], name):
        if kind == b"ds64":
            sizes = file.read(16)
            data_size_64 = struct.unpack("<QQ", sizes)[1] if len(sizes) == 16 else 0
        if kind == b"data":
            data_start, length = content, n_bytes
            break
    else:  # there are no samples, and the decoder will reject the file
        return Part(start, size - start), size
    header_size = data_start - start
    is_64 = magic in (b"RF64", b"BW64") and length == _MAX_U32
    if is_64:
        length = data_size_64
    if order == ">":
        riff_size = int.from_bytes(riff_size.to_bytes(4, "little"), "big")
    unknown = data_start + length > size and _is_placeholder(length, header_size)
    if length == 0 and size > data_start:
        file.seek(data_start)
        consistent = start + 9 + riff_size >= size and not _is_placeholder(riff_size, header_size)
        unknown = not consistent and file.read(4) not in _RIFF
    if unknown:
        prefix = _riff_header(file, start, data_start, size - data_start, order)
        return Part(data_start, size - data_start, prefix), size
    _check_end(data_start + length, size, name)
    end = _riff_end(file, data_start + length, size, name)
    if magic == b"BW64":  # libsndfile accepts only the older name RF64
        return Part(start + 4, end - start - 4, b"RF64"), end
    return Part(start, end - start), end


def _riff_header(file: BinaryIO, start: int, data_start: int, n_bytes: int, order: str) -> bytes:
    """Create a copy of the RIFF header of a WAV file, with its size fields corrected."""
    file.seek(start)
    header = bytearray(file.read(data_start - start))
    header[:4] = b"RIFX" if order == ">" else b"RIFF"
    if header[12:16] == b"ds64":
        header[12:16] = b"JUNK"
    riff_size = data_start - start - 8 + n_bytes
    header[4:8] = struct.pack(order + "I", min(riff_size, _MAX_U32))
    header[-4:] = struct.pack(order + "I", min(n_bytes, _MAX_U32))
    return bytes(header)


def _riff_end(file: BinaryIO, position: int, size: int, name: str) -> int:
    """Return the start of the WAV file that follows samples ending at `position`, or `size` if none does."""
    data_end = position
    position += position & 1
    for content, kind, length in _chunks(file, position, _CHUNK["<"], name):
        position = content - 8
        if kind in _RIFF and file.read(4) == b"WAVE":
            return position
        if not all(0x20 <= byte < 0x7F for byte in kind):
            break
        position = content + length + (length & 1)
    file.seek(position)
    if position < size and size - position > _MAX_PADDING and any(file.read(_MAX_PADDING)):
        raise AudioError(
            f"{name}: its header states that the samples end at byte {data_end}, but {size - position} bytes "
            "of unknown content follow; repair the header (for example with sox --ignore-length)"
        )
    return size


def _check_au(file: BinaryIO, size: int, name: str) -> Part:
    file.seek(0)
    header = bytearray(file.read(12))
    order = ">" if header[:4] == b".snd" else "<"
    offset, length = struct.unpack(order + "II", header[4:])
    n_bytes = size - offset
    if n_bytes > 0 and (length == 0 or (length > n_bytes and _is_placeholder(length, offset))):
        header[8:12] = struct.pack(order + "I", min(n_bytes, _MAX_U32))
        return Part(12, size - 12, bytes(header))
    _check_end(offset + length, size, name)
    return Part(0, size)


def _aiff_end(file: BinaryIO, name: str) -> int:
    """Return the end of an AIFF file's samples according to its header, or 0 if it has no samples."""
    ends = (start + length for start, kind, length in _chunks(file, 12, _CHUNK[">"], name) if kind == b"SSND")
    return next(ends, 0)


def _caf_end(file: BinaryIO, name: str) -> int:
    """Return the end of a Core Audio file's samples that its header states, or 0 if it states none."""
    for start, kind, length in _chunks(file, 8, _CAF_CHUNK, name):
        if length >= 0 and kind == b"data":  # if the length is -1, the samples extend to the end of the file
            return start + length
    return 0


def _split_ogg(file: BinaryIO, size: int, name: str) -> list[Part]:
    """Split an Ogg file into its chained streams (RFC 3533) at its beginning-of-stream pages."""
    starts: list[int] = []
    position = 0
    last_flags = 2
    while position < size:
        file.seek(position)
        header = file.read(27 + 255)
        if header[:4] != b"OggS":
            if find(file, b"OggS", position) < 0:  # there is trailing data, for example an ID3 tag
                break
            raise AudioError(f"{name} is damaged: there is no Ogg page at byte {position}")
        n_segments = header[26] if len(header) > 26 else 0
        end = position + 27 + n_segments + sum(header[27 : 27 + n_segments])
        if len(header) < 27 + n_segments or end > size:
            raise AudioError(f"{name} is truncated: its last Ogg page is incomplete")
        flags = header[5]
        if not starts or (flags & 2 and not last_flags & 2):
            if starts and not last_flags & 4:
                raise AudioError(
                    f"{name} is truncated: the Ogg stream before byte {position} has no page marked as last"
                )
            starts.append(position)
        last_flags = flags
        position = end
    if not last_flags & 4:
        raise AudioError(f"{name} is truncated: its last Ogg page is not marked as the last one")
    ends = [*starts[1:], size]
    return [Part(start, end - start) for start, end in zip(starts, ends, strict=True)]


def find(file: BinaryIO, pattern: bytes, position: int) -> int:
    """Return the first position of a pattern in a file from `position` on, or -1 if there is none."""
    file.seek(position)
    overlap = b""
    while block := file.read(1 << 20):
        index = (overlap + block).find(pattern)
        if index >= 0:
            return file.tell() - len(block) - len(overlap) + index
        overlap = block[-len(pattern) + 1 :]
    return -1
