"""Megatron-Core on a device: patches, process groups, configuration, module specifications."""
