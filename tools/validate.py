"""The loss of a checkpoint on held-out samples, as a run logs it while it trains.

The samples are those of the run's ``data.validation``, or other ones: ``--records`` and
``--images``, or overrides.  Runs in one process, or under torchrun in any parallel layout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.config.evaluation_schema import ValidationSource
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.config.validate_data import check_validation_paths
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext
    from moiie_megatron.training.validation.result import GroupSums, Validation


def main() -> int:
    arguments = parse_arguments()
    dist_env = dist_env_from(os.environ)
    return exit_code(lambda: validate(arguments, dist_env), dist_env)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="step_... directory, or output directory of a run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. parallel.expert=2 or data.validation.samples=null",
    )
    parser.add_argument(
        "--records", metavar="FILE", help="LLaVA records instead of data.validation.sources"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="directory that their image paths are relative to"
    )
    parser.add_argument("--out", metavar="FILE", help="write the losses as JSON")
    return parser.parse_intermixed_args()  # options and overrides in any order


def validate(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Measure the loss; rank 0 prints and writes it.

    Raises:
        UserError: An option, the checkpoint or the samples cannot be used.
    """
    check_source(arguments)
    # Imported here because torch and Megatron take seconds: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.checkpoint.load_weights import load_weights
    from moiie_megatron.data.stream.build import build_encoding
    from moiie_megatron.data.stream.held_out import open_held_out
    from moiie_megatron.generation.checkpoint_config import checkpoint_config
    from moiie_megatron.training.validation.validator import Validator
    from moiie_megatron.vlm.build import build_chunks

    checkpoint = find_checkpoint(arguments.checkpoint)
    config = with_source(checkpoint_config(checkpoint, arguments.overrides), arguments)
    check_config(config, world_size=dist_env.world_size)
    check_validation_paths(config)
    samples = open_held_out(config, build_encoding(config))
    if samples is None:
        raise UserError(
            f"{checkpoint} is of a run without data.validation.sources: give --records and "
            "--images."
        )

    def body(context: ParallelContext) -> None:
        model = build_chunks(config, context)
        load_weights(checkpoint, context, model)
        validator = Validator(config, context, samples)
        is_first = context.rank == 0
        with progress_bar("validating", "records") if is_first else nullcontext(None) as progress:
            result = validator.measure(model, progress=progress)
        assert result is not None  # nothing stops it
        validator.check(result)
        if is_first:
            report(result, checkpoint, arguments.out)

    run_distributed(config, dist_env, body)


def check_source(arguments: argparse.Namespace) -> None:
    """Refuse records without images, and the other way round.

    Raises:
        UserError: One of them is missing.
    """
    records, images = arguments.records, arguments.images
    if (records is None) != (images is None):
        given, missing = ("--records", "--images") if images is None else ("--images", "--records")
        raise UserError(f"{given} is {records or images} but {missing} is missing: give both.")


def with_source(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """The configuration with the records of the command line, if there are any."""
    if arguments.records is None:
        return config
    source = ValidationSource(records=arguments.records, images=arguments.images)
    validation = config.data.validation.model_copy(update={"sources": [source]})
    data = config.data.model_copy(update={"validation": validation})
    return config.model_copy(update={"data": data})


def report(result: Validation, checkpoint: Path, out: str | None) -> None:
    """Print the losses, and write them as JSON."""
    from moiie_megatron.training.validation.result import shown

    parts: dict[str, GroupSums] = {"all samples": result.total, **result.sources}
    parts |= {shown(name): part for name, part in result.image_counts.items()}
    width = max(map(len, parts))
    print(f"{checkpoint}:")
    for name, part in parts.items():
        perplexity = math.exp(part.loss) if part.loss < 700 else math.inf
        image_fraction = part.image_fraction
        print(
            f"{name:>{width}}: loss {part.loss:.6f}, perplexity {perplexity:.4g}, "
            f"{part.samples} samples, {part.label_tokens} label tokens, "
            f"{image_fraction:.0%} image tokens"
        )
    if out is not None:
        with atomic_write(out) as file:
            file.write_text(
                json.dumps({"checkpoint": str(checkpoint), **result.to_json()}, indent=1) + "\n"
            )


if __name__ == "__main__":
    run_program(main)
