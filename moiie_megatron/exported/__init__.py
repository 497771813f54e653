"""Use of an exported directory with transformers alone: answers, single experts, routing.

Nothing here imports Megatron-Core: this runs where only transformers, torch and PIL are
installed beside this package.
"""
