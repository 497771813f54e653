"""Every patch of Megatron-Core and torch, one subject per file, declared in ``registry.py``."""
