"""Generation with Megatron-Core's modules: the key-value cache and what passes between stages."""
