"""Cost estimates of a pretraining: FLOPs, memory, time and money."""
