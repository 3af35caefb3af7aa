"""Training: schedule, optimizer, step, loop, checkpoints, progress."""
