"""Peak rates of GPUs, by name."""

from __future__ import annotations

from typing import Final

# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets (which print the rates with sparsity,
# twice these).  The first entry whose words are all in the name counts.
_PEAKS: Final[tuple[tuple[str, float], ...]] = (
    ("GB200", 2450e12),
    ("GB300", 2450e12),
    ("B200", 2250e12),
    ("B300", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
)


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None for one that is not in the table.

    Args:
        name: As ``torch.cuda.get_device_name`` gives it, e.g. ``NVIDIA H100 80GB HBM3``.
    """
    words = set(name.replace("-", " ").split())
    for entry, peak in _PEAKS:
        if words.issuperset(entry.split()):
            return peak
    return None
