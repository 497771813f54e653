"""Checks of an installation and its GPUs, each with a verdict (``tools/selftest.py``)."""
