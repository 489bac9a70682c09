"""Training loop: engines, optimizer, parallelism, checkpoints and metric logs."""
