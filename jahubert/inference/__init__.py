"""Features, units and transcripts of audio: extraction, CTC decoding, chunking, voice activity, writers."""
