"""Megatron-Core on a device: patches, process groups, configuration, module specifications."""

from moiie_megatron.mcore.patches.warning_filters import filter_megatron_warnings

# Here and not at start-up: Megatron-Core already warns while it is imported.
filter_megatron_warnings()
