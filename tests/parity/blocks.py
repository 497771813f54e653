"""One MoE layer of the size of the golden blocks, and the golden runs of such layers."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, ParallelConfig
from moiie_megatron.mcore.config import transformer_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.vlm.build import moe_module
from tests.parity import tiny

MOIIE_8 = {"num_vision_experts": 2, "num_shared_experts": 4, "num_text_experts": 2}
E4_CASES = ("single", "multi", "text_only", "image_only")
BLOCKS = [
    *(("moiie_block_e4", {"variant": "moiie"}, f"{case}.plain") for case in E4_CASES),
    *(("moiie_block_e8", {"variant": "moiie", **MOIIE_8}, f"{c}.plain") for c in E4_CASES[:2]),
    ("vanilla_block", {"variant": "vanilla"}, "single.all"),
    ("modality_block_v2l2", {"variant": "modality"}, "single.plain"),
]


def build_layer(
    moe: dict[str, object],
    dispatcher: str,
    context: ParallelContext,
    parallel: ParallelConfig | None = None,
) -> MoIIELayer:
    """One layer of the size of the golden blocks, in training mode."""
    section = MoEConfig(
        **moe, layers="all", dispatcher=dispatcher, vision_aux_loss_coeff=0, text_aux_loss_coeff=0
    )
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 1}
    config = tiny.run_config(
        tiny.language("phi3", **sizes), section, parallel=parallel or ParallelConfig()
    )
    layer = build_module(
        moe_module(config, context),
        config=transformer_config(config, context.device),
    )
    layer.set_layer_number(1)
    return layer.train()


def reference_names(layer: MoIIELayer) -> dict[str, Tensor]:
    """Our parameters' values and gradients are compared under the reference's names."""
    layout = layer.router.layout
    names = {}
    for router, gate in layer.router.gates.items():
        names["gate_vis.weight" if router == "vision" else "gate.weight"] = gate
    for expert in range(layout.num_experts):
        block = f"experts.{expert}"
        if layout.num_shared == 0:  # Modality MoE has two lists of experts
            text = expert - layout.num_vision
            block = f"vis_experts.{expert}" if text < 0 else f"lan_experts.{text}"
        names[f"{block}.gate_up_proj.weight"] = (layer.experts.weight_fc1, expert)
        names[f"{block}.down_proj.weight"] = (layer.experts.weight_fc2, expert)
    return names
