"""Japanese text to words and phones, and the user dictionary."""
