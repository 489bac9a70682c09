"""Error rates, scoring, lexicon decoding, and quality of units and layers."""
