"""The final report: tables, figures, examples and the HTML page."""
