"""The sections that set fields of Megatron-Core's configuration classes, and what may be set.

``megatron`` is for TransformerConfig, ``ddp`` for DistributedDataParallelConfig and
``optimizer.megatron`` for OptimizerConfig.  Only fields in a section's table ``allowed`` may be
set; tests show for each of them what it changes.  All others are set by another key (``owned``) or
refused with a reason (``refused``).  ``docs/megatron-section.md`` is generated from these tables.
"""
