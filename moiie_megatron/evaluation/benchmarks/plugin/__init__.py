"""lmms-eval's side: the models that it finds by entry point.

Runs in lmms-eval's environment, where nothing of Megatron-Core is installed.
"""
