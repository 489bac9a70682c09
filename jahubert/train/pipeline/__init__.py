"""The stage pipeline: Hydra composition and preflight checks."""
