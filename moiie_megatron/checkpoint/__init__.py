"""A run's own checkpoints: saving, finding, loading."""
