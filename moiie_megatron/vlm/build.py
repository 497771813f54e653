"""Build this rank's part of the model from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.layout.vocabulary import padded_vocab_size
from moiie_megatron.mcore.config import torch_dtype, transformer_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.rope import scaled_rotary_embedding
from moiie_megatron.mcore.specs import decoder_spec, submodules_of
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher
from moiie_megatron.moe.layer import moiie_module
from moiie_megatron.moe.reference_aux_loss import PooledLoads
from moiie_megatron.moe.router import RouterSettings
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.chunks import ModelChunks
from moiie_megatron.vlm.connector import Connector
from moiie_megatron.vlm.language_model import LanguageModel
from moiie_megatron.vlm.model import MoIIEModel
from moiie_megatron.vlm.vision import VisionEncoder


def build_chunks(config: RunConfig, context: ParallelContext) -> ModelChunks:
    """Build this rank's part of the model on its device, in the dtype of the run.

    Raises:
        UserError: A setting that Megatron-Core cannot express.
    """
    # One object for all chunks: Megatron's schedules read it from the first one.
    mconfig = transformer_config(config, context.device)
    experts = moe_module(config, context) if config.moe_layers else None
    chunks = range(config.parallel.virtual_pipeline)
    return ModelChunks(_build_chunk(config, context, mconfig, experts, chunk) for chunk in chunks)


def build_model(config: RunConfig, context: ParallelContext) -> MoIIEModel:
    """``build_chunks`` for programs without virtual pipeline stages, where a rank has one chunk.

    Raises:
        UserError: Virtual pipeline stages, or a setting that Megatron-Core cannot express.
    """
    if config.parallel.virtual_pipeline != 1:
        raise UserError(
            f"parallel.virtual_pipeline is {config.parallel.virtual_pipeline}: only training has "
            "virtual stages, use 1."
        )
    (model,) = build_chunks(config, context)
    return model


def _build_chunk(
    config: RunConfig,
    context: ParallelContext,
    mconfig: TransformerConfig,
    experts: ModuleSpec | None,
    chunk: int,
) -> MoIIEModel:
    """One pipeline stage of this rank, the ``chunk``-th of its virtual stages."""
    language, device = config.language, context.device
    virtual = config.parallel.virtual_pipeline
    assert config.pipeline_layers is not None  # see config/validate_parallel.py
    ranks = layers_of_ranks(config.pipeline_layers, config.parallel.pipeline)
    layers = ranks[context.groups.pp.rank()][chunk]
    spec = decoder_spec(mconfig, device, moe_module=experts, layers=layers)
    is_first = context.is_first_stage and chunk == 0
    is_last = context.is_last_stage and chunk == virtual - 1
    language_model = LanguageModel(
        config=mconfig,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(language.vocab_size, context.groups.tp.size()),
        num_tokens=language.vocab_size,
        max_sequence_length=language.max_position_embeddings,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=language.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=language.rotary_base,
        # Images are merged into the whole sequence before it is split (vlm/model.py).
        scatter_embedding_sequence_parallel=False,
        pg_collection=context.groups,
        vp_stage=chunk if virtual > 1 else None,
    )
    rope = scaled_rotary_embedding(language, mconfig, context.groups)
    if rope is not None:
        language_model.rotary_pos_emb = rope
    vision_encoder = connector = None
    if is_first:
        connector_size = config.connector.hidden_size or language.hidden_size
        vision_encoder = VisionEncoder(config.vision)
        connector = Connector(config.vision.hidden_size, connector_size, language.hidden_size)
        for part in (vision_encoder, connector):
            part.to(device=device.torch_device, dtype=torch_dtype(config))
        _keep_equal_over_tensor_ranks((vision_encoder, connector), context)
    model = MoIIEModel(
        mconfig,
        language_model,
        vision_encoder,
        connector,
        context.groups,
        last_image_token_as_text=config.moe.last_image_token_as_text,
    )
    return model.to(device=device.torch_device)


def router_settings(config: RunConfig) -> RouterSettings:
    """The routers' settings, with alpha divided by the number of MoE layers.

    The reference adds ``alpha * aux`` once, with ``aux`` on the scale of one layer's loss; here
    the losses of the layers add up, so each gets ``alpha / number of MoE layers``.  The pooled
    loss counts once and gets alpha itself.
    """
    moe = config.moe
    alphas = {
        "vision": moe.vision_aux_loss_coeff,
        "text": moe.text_aux_loss_coeff,
        "joint": moe.text_aux_loss_coeff,
    }
    layers = 1 if moe.aux_loss == "pooled" else len(config.moe_layers)
    return RouterSettings(
        layout=moe.layout,
        aux_loss_coeffs={name: alphas[name] / layers for name in moe.layout.routers},
        init_std=moe.router_init_std,
        seed=config.train.seed,
        z_loss_coeff=moe.z_loss_coeff / len(config.moe_layers),
    )


def moe_module(config: RunConfig, context: ParallelContext) -> ModuleSpec:
    """The specification of the module that replaces the FFN in a layer with experts."""
    placement = config.placement
    return moiie_module(
        router_settings(config),
        context.groups,
        context.device.torch_device,
        dispatcher=MoIIETokenDispatcher if config.moe.dispatcher == "moiie" else None,
        physical_to_logical=None if placement.is_identity else placement.physical_to_logical,
        experts=te_experts() if context.device.transformer_engine else None,
        # One object per model: it holds the loads of all layers on one micro-batch.
        pooled_loads=PooledLoads(config.moe_layers) if config.moe.aux_loss == "pooled" else None,
    )


def te_experts() -> Any:
    """Transformer Engine's grouped experts, as Megatron's own MoE specification has them."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=True)
    return submodules_of(spec).experts


def _keep_equal_over_tensor_ranks(
    modules: tuple[torch.nn.Module, ...], context: ParallelContext
) -> None:
    """Give all tensor-parallel ranks the same weights, now and after every step.

    Each rank's gradients are those of its part of the images (``image_split.py``).  Megatron
    averages the gradients of parameters with this mark (``finalize_model_grads``), as for its own
    modules of Hugging Face models (``models/huggingface/module.py``).
    """
    if context.groups.tp.size() == 1:
        return
    source = torch.distributed.get_global_rank(context.groups.tp, 0)
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.data, source, group=context.groups.tp)
        for parameter in module.parameters():
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
