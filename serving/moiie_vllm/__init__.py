"""Lets vLLM serve the directories that ``tools/convert.py export`` writes.

Needs nothing of moiie_megatron or Megatron-Core: the model's code is in the exported directory.
"""

from __future__ import annotations

from typing import Final

ARCHITECTURE: Final = "MoiieForConditionalGeneration"


def register() -> None:
    """Tell vLLM the class of the model (called by vLLM in every process, maybe repeatedly)."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from moiie_vllm.supported import CheckedConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # As a string: only the processes that run the model import it.
        ModelRegistry.register_model(ARCHITECTURE, "moiie_vllm.model:MoiieForVllm")
    MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, CheckedConfig)
