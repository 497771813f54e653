"""Reading the golden data, and the one tolerance for it.

fp32 sums of a few hundred terms in another order (fused attention, grouped products, experts
summed by dispatch order) differ by some 1e-6 relative; an independent implementation reproduced
the data to 1e-6.  1e-4 leaves room for another CPU and is far below the effect of any wrong term:
a wrong expert, mask or factor moves outputs by 1e-2 or more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1] / "golden"
RTOL, ATOL = 1e-4, 1e-5


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(ROOT / f"{name}.safetensors")


def numbers(name: str) -> Any:
    return json.loads((ROOT / f"{name}.json").read_text())


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(
        got.detach().cpu(), want.cpu(), rtol=RTOL, atol=ATOL, msg=lambda text: f"{what}: {text}"
    )


def assert_digest(got: Tensor, want: dict[str, Any], what: str) -> None:
    """Compare a gradient with its digest: shape, norm, extremum and four projections."""
    assert list(got.shape) == want["shape"], what
    flat = got.detach().cpu().double().flatten()
    allowed = RTOL * want["l2"] + 1e-9
    index = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
    probes = [float((flat * torch.sin(0.37 * (k + 1) * index)).sum()) for k in range(4)]
    values = [float(flat.norm()), float(flat.abs().max()), float(flat.sum()), *probes]
    wanted = [want["l2"], want["absmax"], want["sum"], *want["probe"]]
    worst = max(abs(a - b) for a, b in zip(values, wanted, strict=True))
    assert worst <= allowed, f"{what}: {values} is not {wanted} (off by {worst}, {allowed} allowed)"


def dense_directory(family: str, target: Path) -> Path:
    """Put the dense parent of a tiny model together as a Hugging Face directory."""
    shared = {
        name: tensor
        for name, tensor in tensors(f"tiny_{family}_moiie/model").items()
        if ".mlp.experts." not in name and ".mlp.gate." not in name and "gate_vis" not in name
    }
    weights = shared | tensors(f"tiny_{family}_dense/odd_layer_ffn")
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors")
    config = (ROOT / f"tiny_{family}_dense" / "config.json").read_text()
    (target / "config.json").write_text(config)
    return target
