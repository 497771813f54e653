"""Changes of modules right after their import."""

from __future__ import annotations

import sys
from typing import Any

import torch


class _Properties:
    """Of an H100: the newest GPU that none of Transformer Engine's paths treats specially."""

    name = "stand-in"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30


def no_shared_libraries(module: Any) -> None:
    """``transformer_engine.common``: the extension is a module already, ours."""
    module.load_framework_extension = lambda framework: None
    torch.cuda.get_device_properties = lambda *a, **k: _Properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *a, **k: (9, 0)
    torch.cuda.get_device_name = lambda *a, **k: _Properties.name
    torch.cuda.is_current_stream_capturing = lambda: False


def reference_kernels(module: Any) -> None:
    """``transformer_engine.pytorch``: what is no function of the extension."""
    from tests.te.standin.attention import replace_forward

    replace_forward(module.DotProductAttention)
    # It takes the extension's names by `import *`, which leaves out those that are absent.
    extension = sys.modules["transformer_engine_torch"]
    module.cpp_extensions.__getattr__ = extension.__getattr__


def check_found(module: Any) -> None:
    """``megatron.core.extensions.transformer_engine``, which goes on without it."""
    if not module.HAVE_TE:
        raise ImportError("Megatron-Core could not import Transformer Engine.")


def use_on_cpu(module: Any) -> None:
    """``moiie_megatron.mcore.device``: the CPU is as good as a GPU."""
    module._can_run_transformer_engine = lambda device: True
