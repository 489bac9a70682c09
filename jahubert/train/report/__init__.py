"""Experiment report: results, text tables, figures, example utterances and the HTML page."""
