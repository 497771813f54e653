"""Which rank reads which samples in a step, and the micro-batches made from them."""
