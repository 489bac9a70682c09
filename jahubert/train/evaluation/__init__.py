"""Error rates, scoring, tuning of language models, and the quality of units and layers."""
