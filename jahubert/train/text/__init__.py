"""Conversion of Japanese text to words and phones."""
