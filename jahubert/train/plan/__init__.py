"""Cost estimates of a run before it starts: FLOPs, memory, disk and hours per stage."""
