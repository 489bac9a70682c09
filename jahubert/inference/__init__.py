"""Inference: features, units and transcripts of recordings, and output formats for transcripts."""
