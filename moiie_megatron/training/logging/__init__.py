"""What a run reports: standard output, JSON lines, TensorBoard."""
