"""The ``megatron`` section: every field of Megatron-Core's TransformerConfig, and what may be set.

Only fields in ``allowed.py`` may be set; tests show for each of them what it changes.  All others
are set by another key (``owned.py``) or refused with a reason (``refused.py``).
``docs/megatron-section.md`` is generated from these tables.
"""
