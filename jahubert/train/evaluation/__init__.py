"""Evaluation: error rates, scoring, tuning of language models, and quality of units and layers."""
