"""fp32 with all its bits, for the time of a block."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from moiie_megatron.selftest.check import full_precision


def test_full_precision_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    product = object()
    monkeypatch.setattr(moe_utils, "te_general_gemm", product, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="planted"), full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert moe_utils.te_general_gemm is None
            raise RuntimeError("planted")
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert moe_utils.te_general_gemm is product
    finally:
        torch.set_float32_matmul_precision(before)
