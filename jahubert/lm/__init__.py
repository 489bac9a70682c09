"""N-gram language models: ARPA files, Kneser-Ney estimation, and lexicons for decoding."""
