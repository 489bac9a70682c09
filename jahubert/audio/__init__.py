"""Audio input: conversion of files, byte ranges, streams and arrays to mono float32 at 16 kHz.

soundfile decodes WAV, FLAC, Ogg, MP3, AIFF and other formats. An optional decoder handles m4a, mp4, webm, aac
and wma. Lengths in headers are checked against the content: a file is either decoded completely, or an error
is raised.
"""

from jahubert.audio.loading import AudioLike, audio_length, is_recording, load_audio, stream_audio
from jahubert.audio.sources import AudioSource

__all__ = ["AudioLike", "AudioSource", "audio_length", "is_recording", "load_audio", "stream_audio"]
