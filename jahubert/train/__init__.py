"""Training and evaluation ("ring 2" in docs/layout.md), from a corpus to error rates; extra `train`."""
