"""Cost estimates for a run before it starts: FLOPs, memory, disk space and hours per stage."""
