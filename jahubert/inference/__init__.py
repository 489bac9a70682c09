"""Features, units and transcripts from audio: extraction, CTC decoding, chunking, voice activity, writers."""
