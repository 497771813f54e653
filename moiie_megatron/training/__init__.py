"""Training: a run, its steps, stages, optimizer state and logs."""
