"""Search for audio files in folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path

AUDIO_ENDINGS = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".w64",
    ".rf64", ".bw64", ".caf", ".sph", ".nist",
    ".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka",  # these formats need an optional decoder
)  # fmt: skip


def find_audio(folder: str | os.PathLike[str]) -> tuple[list[Path], list[OSError]]:
    """Find the audio files below a folder by their suffixes.

    macOS metadata files, pipes, sockets and devices are skipped. Broken links are included, so that opening
    them reports the problem. Links to folders are not followed.

    Returns:
        The files, sorted by path, and one error for each folder that cannot be read.
    """
    errors: list[OSError] = []
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        if "__MACOSX" in folders:
            folders.remove("__MACOSX")
        paths += (path for name in names if _is_audio(path := Path(parent, name)))
    return sorted(paths), errors


def is_sidecar(path: Path) -> bool:
    """Return whether a file contains metadata that macOS stores next to another file."""
    return path.name.startswith("._")


def _is_audio(path: Path) -> bool:
    if path.suffix.lower() not in AUDIO_ENDINGS or is_sidecar(path):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True
