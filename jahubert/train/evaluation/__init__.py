"""Error rates, scoring, lexicon decoding, and the quality of units and layers."""
