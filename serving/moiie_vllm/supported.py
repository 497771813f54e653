"""What cannot be served with right answers, refused before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import vllm
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

OLDEST, NEWEST = (0, 32), (0, 33)  # minor versions of vLLM; tests run with 0.32, 0.33 was read
# Drafts that need nothing but the tokens so far.
TOKEN_DRAFTS = ("ngram", "ngram_gpu", "suffix")

logger = init_logger(__name__)


class CheckedConfig(VerifyAndUpdateConfig):
    """Called by vLLM when the configuration is complete, in the process that was started."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        version = vllm.__version_tuple__[:2]
        if not OLDEST <= version <= NEWEST:
            logger.warning(
                "moiie-vllm is made for vLLM %s to %s, this is %s: compare its answers with "
                "those of transformers.",
                *(".".join(map(str, pair)) for pair in (OLDEST, NEWEST)),
                vllm.__version__,
            )
        check(vllm_config)


def check(vllm_config: VllmConfig) -> None:
    """Refuse a model or an engine configuration whose answers would be wrong.

    Raises:
        ValueError: One sentence that names the option or the key of ``config.json``.
    """
    model = vllm_config.model_config
    for reason in (
        *_of_model(model.hf_config, model.max_model_len),
        *_of_layout(vllm_config.parallel_config),
        *_of_inputs(model, vllm_config),
    ):
        raise ValueError(f"This MoIIE model cannot be served: {reason}.")


def _of_model(config: PreTrainedConfig, max_model_len: int) -> Iterator[str]:
    text = config.get_text_config()
    if getattr(config, "last_image_token_as_text", False):
        yield (
            "last_image_token_as_text is true, which needs the type of each token's successor, "
            "and requests are computed in pieces and side by side; train it with false, or "
            "generate with transformers"
        )
    if config.moe_layers and text.hidden_act not in ("silu", "swish"):
        yield (
            f"hidden_act is {text.hidden_act}, and vLLM's Transformers backend computes experts "
            "with silu; generate with transformers"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("longrope", "dynamic"):
        # One sequence that is longer would change the frequencies of all sequences of its batch,
        # and of keys that are in the cache already.
        longest = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        if max_model_len > longest:
            yield (
                f"rope_type is {kind}, whose frequencies change beyond {longest} tokens, and "
                f"max_model_len is {max_model_len}; use --max-model-len {longest}"
            )


def _of_layout(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, and only the first "
            "stage is told which tokens are images; use 1, and tensor_parallel_size instead"
        )
    if parallel.prefill_context_parallel_size > 1:
        yield (
            f"prefill_context_parallel_size is {parallel.prefill_context_parallel_size}, which "
            "divides a prompt but not the types of its tokens; use 1"
        )
    if parallel.enable_expert_parallel and current_platform.is_cpu():
        yield (
            "enable_expert_parallel is on, and vLLM's kernel for experts on CPUs reads beyond its "
            "own; leave it off: tensor_parallel_size alone divides every expert"
        )
    if parallel.use_ubatching:
        yield (
            "micro-batches (enable_dbo or ubatch_size) divide a batch but not the types of its "
            "tokens; leave them off"
        )


def _of_inputs(model: ModelConfig, vllm_config: VllmConfig) -> Iterator[str]:
    if model.enable_prompt_embeds:
        yield (
            "enable_prompt_embeds is on, and embeddings do not tell which positions are image "
            "tokens; leave it off, and pass images"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in TOKEN_DRAFTS:
        yield (
            f"speculative decoding with {speculative.method} reads hidden states that the model "
            f"does not return, or needs a draft model; use one of {', '.join(TOKEN_DRAFTS)}"
        )
