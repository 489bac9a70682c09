"""Stage pipeline: composition of settings, preflight checks and the stage runner."""
