"""What the samples of a run are, and which micro-batches a rank gets of them."""
