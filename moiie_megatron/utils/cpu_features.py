"""What the CPU can do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

CPUINFO: Final = Path("/proc/cpuinfo")
_BF16: Final = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # x86, then Arm


def has_bf16_instructions(cpuinfo: Path = CPUINFO) -> bool | None:
    """Whether the CPU multiplies BF16 numbers itself; None where that is not known.

    Without such instructions a product in bf16 takes many times as long as in fp32.

    Args:
        cpuinfo: What Linux says about the CPU.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return not _BF16.isdisjoint(lines[0].split()) if lines else None


def fast_precision(cpuinfo: Path = CPUINFO) -> Literal["bf16", "fp32"]:
    """The precision (``train.precision``) to use on this CPU: bf16 where it is known to be fast."""
    return "bf16" if has_bf16_instructions(cpuinfo) else "fp32"
