"""Time per generated token: the export against transformers' Llama, Megatron against the export.

    python benchmarks/generate.py                   # batches of 1 and 8, as a table
    python benchmarks/generate.py --json FILE       # the same as JSON

All systems continue the same prompts of text greedily by the same number of tokens, with a
key-value cache, in fp32, interleaved in one process; the time of the whole call, prompt included,
is divided by the tokens that each prompt gets.  The export is the code and the weights that
``tools/convert.py export`` writes, read with transformers.  Llama is transformers' own dense model
with as many weights in the products for a token: a token passes one FFN in the dense layers and
top-k of the same size in the layers with experts, and Llama's FFN has the mean of these widths in
every layer.  The vision encoder takes no part: it runs once per image, before the first token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from moiie_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from moiie_megatron.convert.fill_model import Get, fill_model
from moiie_megatron.convert.hf.export_files import model_config
from moiie_megatron.families.hf_config import language_to_hf
from moiie_megatron.families.weight_map import model_rows
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.generation.token_generator import TokenGenerator
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.layout.token_types import TEXT
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.selftest.checks.models import seeded_weights, tiny_vision
from moiie_megatron.utils.timing import Timings, interleave
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.model import MoIIEModel

BATCHES = (1, 8)  # prompts

Run = Callable[[], Tensor]


def run_config(options: argparse.Namespace) -> RunConfig:
    """A MoIIE with experts in every other layer, and a vision encoder that is not used."""
    return RunConfig(
        output="unused",
        language=LanguageConfig(
            family="llama",
            num_layers=options.layers,
            hidden_size=options.hidden,
            ffn_hidden_size=options.ffn,
            num_attention_heads=options.hidden // 64,
            num_query_groups=options.hidden // 64 // 3,
            vocab_size=options.vocabulary,
            max_position_embeddings=4096,
        ),
        vision=tiny_vision(),
        stage=StageConfig(
            name="joint",
            moe=True,
            learning_rates={"moe": 1e-4},
            template="plain",
            image_mode="square",
        ),
        data=DataConfig(sources=[], tokenizer="unused", sequence_length=512),
        train=TrainConfig(
            global_batch_size=1, micro_batch_size=1, steps=1, precision="fp32", device="cpu"
        ),
    )


def export(config: RunConfig, weights: Get) -> MoiieForConditionalGeneration:
    """The exported model, written and read as users have it."""
    ids: Any = SimpleNamespace(  # of a tokenizer, which random weights need not
        image_id=1, bos_id=None, eos_id=None, pad_id=0
    )
    hf_config = model_config(config, ids, [], torch.float32)
    tensors: dict[str, Tensor] = {}
    for row in model_rows(config):
        parts = row.transform.to_hf(weights(row.megatron, row.expert))
        tensors |= {
            name: part.contiguous().clone() for name, part in zip(row.hf, parts, strict=True)
        }
    with tempfile.TemporaryDirectory() as folder:
        hf_config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model: Any = MoiieForConditionalGeneration.from_pretrained(folder)
        return model.eval()


def llama(config: RunConfig) -> LlamaForCausalLM:
    """The dense model with as many weights in the products for a token."""
    language, sparse = config.language, len(config.moe_layers)
    dense = language.num_layers - sparse
    widths = dense + sparse * config.moe.layout.top_k
    hf_config = language_to_hf(language)
    hf_config.intermediate_size = language.ffn_hidden_size * widths // language.num_layers
    return LlamaForCausalLM(hf_config).eval()


def continued(model: Any, tokens: Tensor, new_tokens: int) -> Run:
    """Greedy generation of transformers, which no token ends."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    mask = torch.ones_like(tokens)

    def run() -> Tensor:
        output = model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
        return output[:, tokens.shape[1] :]

    return run


def megatron(
    config: RunConfig, context: ParallelContext, model: MoIIEModel, tokens: Tensor, count: int
) -> Run:
    """This project's greedy generation, which no token ends."""
    no_images = torch.empty(0, 3, config.vision.image_size, config.vision.image_size).byte()
    types = torch.full(tokens[0].shape, TEXT, dtype=torch.int8)
    prompts = [Prompt(row, types, no_images) for row in tokens]

    generator = TokenGenerator(config, context, model, config.language.vocab_size)
    return lambda: torch.tensor(generator.generate(prompts, count))


def compare(
    runs: dict[str, Run], batch: int, options: argparse.Namespace
) -> tuple[Timings, dict[str, float]]:
    """Time all systems on one batch; milliseconds per token by system."""
    timings = interleave(runs, rounds=options.rounds, warmup=1)
    per_token = {name: 1e3 * timings.median(name) / options.new_tokens for name in runs}
    line = "  ".join(f"{name} {ms:.1f}" for name, ms in per_token.items())
    print(
        f"batch {batch}: ms per token {line}  export over llama "
        f"{timings.ratio('export', 'llama'):.3f}  megatron over export "
        f"{timings.ratio('megatron', 'export'):.3f}",
        flush=True,
    )
    return timings, per_token


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 192")
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = run_config(options)
    context = init_parallel(config.active_parallel, DistEnv(), device="cpu")
    weights = seeded_weights(config)
    models = {"llama": llama(config), "export": export(config, weights)}
    trained = build_model(config, context).eval()
    fill_model(trained, weights)
    result: dict[str, Any] = {}
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(options.vocabulary, (batch, options.prompt), generator=generator)
        runs = {
            name: continued(model, tokens, options.new_tokens) for name, model in models.items()
        }
        runs["megatron"] = megatron(config, context, trained, tokens, options.new_tokens)
        assert torch.equal(runs["megatron"](), runs["export"]()), "the answers differ"
        timings, per_token = compare(runs, batch, options)
        result[f"batch{batch}_over_llama"] = timings.ratio("export", "llama")
        result[f"batch{batch}_megatron_over_export"] = timings.ratio("megatron", "export")
        result[f"batch{batch}_ms_per_token"] = per_token
    result["megatron_over_export"] = max(
        result[f"batch{batch}_megatron_over_export"] for batch in BATCHES
    )
    destroy_parallel()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
