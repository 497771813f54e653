"""Several samples in a row: which ones share it, on which rank, and how they get there."""
