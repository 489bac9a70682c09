"""Checkpoint formats, each in one module, and helpers that read and write files safely."""
