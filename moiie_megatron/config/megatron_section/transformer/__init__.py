"""The tables of the ``megatron`` section: fields of Megatron-Core's TransformerConfig."""
