"""Generation from Megatron checkpoints with a key-value cache, at any parallel layout."""
