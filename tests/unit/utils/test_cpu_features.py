"""Which CPUs have BF16 instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.utils.cpu_features import fast_precision, has_bf16_instructions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor\t: 0\nvendor_id\t: bf16\n", None),
        (None, None),
    ],
)
def test_cpus(text: str | None, expected: bool | None, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert has_bf16_instructions(cpuinfo) is expected
    assert fast_precision(cpuinfo) == ("bf16" if expected else "fp32")
