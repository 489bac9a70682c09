"""Audio input: conversion of files, byte ranges, streams and arrays to mono float32 at 16 kHz.

soundfile decodes WAV, FLAC, Ogg, MP3, AIFF and others; an optional decoder handles m4a, mp4, webm, aac and
wma. Lengths in headers are checked against the content, so files are decoded completely or raise an error.
"""

from jahubert.audio.loading import AudioLike, audio_length, is_recording, load_audio, stream_audio
from jahubert.audio.sources import AudioSource

__all__ = ["AudioLike", "AudioSource", "audio_length", "is_recording", "load_audio", "stream_audio"]
