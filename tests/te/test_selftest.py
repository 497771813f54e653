"""tools/selftest.py where Transformer Engine is: what it skips elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.selftest.checks.parity import MODEL_TOLERANCE, check_transformer_engine
from tests.helpers.launch import command, run
from tests.unit.selftest.sessions import session

CHECKS = ("te", "checkpoints", "layer-speed", "step-speed")


@pytest.mark.slow
def test_checks_with_transformer_engine(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = command(
        "tools/selftest.py",
        ["--device", "cpu", "--json", file, "--only", *CHECKS],
        hook="tests.te.selftest_hooks:references_without",
    )
    done = run(words, timeout=250)
    assert done.code == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())["checks"]
    assert {report[name]["status"] for name in CHECKS} == {"PASS"}
    assert report["process-groups"]["figures"]["transformer_engine"]
    assert set(report["te"]["figures"]) == {"padded fp32", "padded bf16", "packed bf16"}
    # Nothing is TF32 here, so what is left is the order of sums.
    assert max(report["te"]["figures"]["padded fp32"].values()) < 1e-3
    assert "moiie, TE experts" in report["layer-speed"]["figures"]["milliseconds"]


def test_attention_across_samples_is_found(
    te: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in Transformer Engine's module: a packed row is one segment."""
    from transformer_engine.pytorch import DotProductAttention

    original = DotProductAttention.forward

    def forward(self: Any, query: Tensor, *rest: Any, **options: Any) -> Tensor:
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            if options.get(name) is not None:
                options[name] = torch.tensor([0, len(query)], dtype=torch.int32)
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            if options.get(name) is not None:
                options[name] = len(query)
        return original(self, query, *rest, **options)

    monkeypatch.setattr(DotProductAttention, "forward", forward)
    found = check_transformer_engine(session(te))
    assert found.status == "FAIL"
    assert found.reason.startswith("packed bf16: "), found.reason
    assert max(found.figures["padded bf16"].values()) < MODEL_TOLERANCE["bf16"]
