"""Audio input: conversion of files, byte ranges, streams and arrays to mono float32 at 16 kHz.

soundfile decodes WAV, FLAC, Ogg, MP3, AIFF and other formats. An optional decoder handles m4a, mp4, webm,
aac, wma and similar formats. Lengths in headers are checked against the content, so that a truncated file
raises an error instead of being decoded in part, except in the few formats that state no length.
"""

from jahubert.audio.loading import (
    AudioLike,
    audio_length,
    is_recording,
    is_seekable,
    load_audio,
    stream_audio,
)
from jahubert.audio.sources import AudioSource

__all__ = [
    "AudioLike",
    "AudioSource",
    "audio_length",
    "is_recording",
    "is_seekable",
    "load_audio",
    "stream_audio",
]
