"""Which samples a step has, and the batches that they become."""
