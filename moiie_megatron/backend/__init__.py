"""Megatron-Core on a device: patches, process groups, configuration, module specifications."""

from moiie_megatron.backend.quiet import quiet_megatron

# Here and not at start-up: Megatron-Core already warns while it is imported.
quiet_megatron()
