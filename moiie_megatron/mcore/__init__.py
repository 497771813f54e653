"""Megatron-Core on a device: process groups, configuration, module specifications, patches.

Importing this package has one side effect: it installs the warning filters of
``patches/warning_filters.py``, because Megatron-Core already warns while it is imported, and
everything that imports it comes through here.
"""

from moiie_megatron.mcore.patches.warning_filters import filter_megatron_warnings

filter_megatron_warnings()
