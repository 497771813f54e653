"""Every patch of Megatron-Core, one subject per file."""
