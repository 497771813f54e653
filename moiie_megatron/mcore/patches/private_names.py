"""Methods of Megatron-Core that are overridden, and private names that are used elsewhere."""

from __future__ import annotations

from typing import Final

from moiie_megatron.mcore.patches.patch import Patch

_GPT = "megatron.core.models.gpt.gpt_model.GPTModel"
_MOE = "megatron.core.transformer.moe.moe_layer.MoELayer"
_CHAINED = "megatron.core.optimizer.optimizer.ChainedOptimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_HYBRID = "megatron.core.optimizer.cpu_offloading.HybridDeviceOptimizer"
_NO_CHECK = "A name that is used, not a gap that is mended."

PATCHES: Final = (
    Patch(
        name="logits of labelled tokens",
        kind="override",
        targets=(f"{_GPT}._postprocess",),
        reason="vlm/language_model.py selects the labelled tokens there: between the decoder and "
        "the output layer GPTModel calls nothing else.  Their positions arrive as loss_mask.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="token types",
        kind="override",
        targets=(f"{_MOE}.forward",),
        reason="moe/layer.py receives token types as padding_mask; MoELayer.forward would turn "
        "them into booleans.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="attention with a cache",
        kind="override",
        targets=(
            "megatron.core.transformer.attention.SelfAttention.forward",
            "megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors",
        ),
        reason="mcore/inference/attention.py: Megatron's static batching has one length for all "
        "rows, and stores keys without rotary embedding, which it computes anew for the whole "
        "cache in every layer and step.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="skipped updates",
        kind="override",
        targets=(f"{_CHAINED}.get_grad_norm", f"{_CHAINED}.step_with_ready_grads"),
        reason="mcore/optimizer.py: ChainedOptimizer.step calls the first before the second, so "
        "that a gradient which is not finite is seen before any weight changes.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="scaled RoPE",
        kind="override",
        targets=(
            "megatron.core.models.common.embeddings.rotary_pos_embedding."
            "RotaryEmbedding.get_freqs_non_repeated",
        ),
        reason="mcore/rope.py gives frequencies of its own to everything that RotaryEmbedding "
        "makes of them.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="optimizer state of a rank",
        kind="private name",
        targets=(
            f"{_DISTRIBUTED}._get_main_param_and_optimizer_states",
            f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
            f"{_HYBRID}._sync_sub_optimizers_state_to_hdo",
            f"{_HYBRID}._sync_hdo_state_to_sub_optimizers",
        ),
        reason="checkpoint/inner_state.py takes the state of a parameter from the first and gives "
        "it back with the others; optimizer_shards.py takes the range that this rank owns from the "
        "attribute gbuf_ranges: no public method gives either without a parallel layout or a "
        "gather.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="files of a rank",
        kind="private name",
        targets=(
            "megatron.core.dist_checkpointing.strategies.filesystem_async."
            "FileSystemWriterAsync.write_preloaded_data",
        ),
        reason="checkpoint/parallel_io.py writes a file with it while the tensors are copied to "
        "the host one by one; Megatron-Core copies all of them before.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="operations that are not watched",
        kind="private name",
        targets=("torch.utils._python_dispatch._disable_current_modes",),
        reason="simulation/ computes where tokens go between the operations of a step, which its "
        "modes must not count as the program's own; torch has no public way to leave all modes.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="checkpoint entries",
        kind="private name",
        targets=(
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_parameter",
        ),
        reason="convert/dcp/ reads and writes the files of torch's distributed checkpoints tensor "
        "by tensor, which torch's own reader and writer cannot.",
        need_not_shown=_NO_CHECK,
    ),
    Patch(
        name="allocator settings",
        kind="private name",
        targets=("torch._C._accelerator_setAllocatorSettings",),
        reason="mcore/gpu_environment.py sets what PYTORCH_ALLOC_CONF says in a process that has "
        "imported torch already; the public function for it is deprecated and has no successor.",
        need_not_shown=_NO_CHECK,
    ),
)
