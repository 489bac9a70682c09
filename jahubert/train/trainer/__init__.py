"""The training loop, its engines, optimizer, parallelism, checkpoints and logs."""
