"""The report of an experiment: results, text tables, figures, example utterances and the HTML page."""
