"""Audio input: files, byte ranges, streams and arrays to mono float32 waveforms at 16 kHz.

soundfile decodes WAV, FLAC, Ogg, MP3, AIFF and others; an optional decoder handles m4a, mp4, webm, aac and
wma. A file is decoded completely or an error is raised: lengths in headers are checked against the content.
"""

from jahubert.audio.loading import AudioLike, audio_length, is_recording, load_audio, stream_audio
from jahubert.audio.sources import AudioSource

__all__ = ["AudioLike", "AudioSource", "audio_length", "is_recording", "load_audio", "stream_audio"]
