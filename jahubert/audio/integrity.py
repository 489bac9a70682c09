"""Detection of truncated files and wrong FLAC lengths, which libsndfile accepts without an error.

In some rare formats, libsndfile reads a truncated file as a shorter one, and reports this at most in its log.
It stops reading a FLAC stream at the sample count in the header, even if more frames follow. The headers of
IRCAM, PAF and PVF files state no length, so their truncation cannot be detected.
"""

from __future__ import annotations

import re
from typing import BinaryIO

import soundfile

_MAX_STATED = 1 << 40  # bytes; programs that write to a pipe state larger or negative sizes
# Lines in libsndfile's log from which truncation is detected.
_TRUNCATED = re.compile(r"truncated file|File seems to be truncated")
_SIZE = re.compile(r"^ ?\w{4} : (\d+) \(should be (\d+)\)", re.MULTILINE)
_FRAMES = re.compile(r"\b(?:Frames|Cols)\s*: (\d+)")
_LOGGED = ("AVR", "MAT4", "MAT5", "MPC2K", "SVX", "VOC", "W64")  # formats whose log shows the stated length
_NIST_FRAMES = re.compile(rb"\bsample_count -i (\d+)")
_NIST_HEADER = 1024  # bytes
_TAGS = 4096  # bytes; assumed maximum size of tags after the last FLAC frame
_MAX_FRAME = 1 << 17  # bytes; assumed maximum size of a FLAC frame if the header does not state it


def is_truncated(sound: soundfile.SoundFile, file: BinaryIO) -> bool:
    """Return whether the header of an open file states more samples than the file contains.

    Only NIST files and those in the formats of `_LOGGED` are examined.

    Args:
        sound: the file, opened with soundfile.
        file: the same file, opened in binary mode.
    """
    if sound.format == "NIST":
        position = file.tell()  # libsndfile continues from here
        file.seek(0)
        stated = _NIST_FRAMES.search(file.read(_NIST_HEADER))
        file.seek(position)
        return stated is not None and int(stated[1]) > sound.frames
    if sound.format not in _LOGGED:
        return False
    log = sound.extra_info
    frames = [int(number) for number in _FRAMES.findall(log)]
    sizes = [(int(stated), int(actual)) for stated, actual in _SIZE.findall(log)]
    return (
        _TRUNCATED.search(log) is not None
        or (bool(frames) and frames[-1] > sound.frames)
        or any(actual < stated < _MAX_STATED for stated, actual in sizes)
    )


def flac_samples(file: BinaryIO, size: int) -> int | None:
    """Return the number of samples up to the end of the last frame of a FLAC file (RFC 9639, section 9).

    Args:
        file: a file that begins with a FLAC stream.
        size: size of the file in bytes.

    Returns:
        The number, or None if the file has no FLAC header or the last frame is not found.
    """
    file.seek(0)
    head = file.read(42)
    if head[:4] != b"fLaC" or len(head) < 42:
        return None
    max_block = int.from_bytes(head[10:12], "big")
    max_frame = int.from_bytes(head[15:18], "big") or _MAX_FRAME
    channels = (head[20] >> 1 & 7) + 1
    start = max(42, size - max_frame - _TAGS)
    file.seek(start)
    tail = file.read(size - start)
    ends = []
    for sync in (b"\xff\xf8", b"\xff\xf9"):  # frame headers that contain a frame number or a sample number
        position = len(tail)
        while (position := tail.rfind(sync, 0, position)) >= 0:
            end = _frame_end(tail[position : position + 17], max_block, channels)
            if end is not None:
                ends.append((position, end))
                break
    return max(ends)[1] if ends else None


def _frame_end(head: bytes, max_block: int, channels: int) -> int | None:
    """Return the position of the first sample after a FLAC frame, or None if `head` is not a frame header."""
    if len(head) < 6 or head[3] & 1:
        return None
    block_code, rate_code, assignment = head[2] >> 4, head[2] & 15, head[3] >> 4
    if block_code == 0 or rate_code == 15 or channels != (assignment + 1 if assignment < 8 else 2):
        return None
    ones = 8 - (~head[4] & 0xFF).bit_length()  # the frame or sample number is coded as in UTF-8
    if ones == 1 or ones == 8 or assignment > 10:
        return None
    position = 4 + max(1, ones)
    number = head[4] & (0x7F >> ones)
    for byte in head[5:position]:
        number = number << 6 | byte & 0x3F
    extra = {6: 1, 7: 2}.get(block_code, 0)
    if block_code == 1:
        block = 192
    elif extra:
        block = int.from_bytes(head[position : position + extra], "big") + 1
    else:
        block = 576 << block_code - 2 if block_code < 6 else 256 << block_code - 8
    position += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if block > max_block or position >= len(head) or _crc8(head[:position]) != head[position]:
        return None
    first = number if head[1] & 1 else number * max_block
    return first + block


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc
