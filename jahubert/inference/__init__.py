"""Inference: features, units and transcripts of recordings, and their output formats."""
