"""Measure exact-match accuracy on LLaVA questions, with the images and with the images blanked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

if TYPE_CHECKING:
    from moiie_megatron.evaluation.score import Score
    from moiie_megatron.mcore.parallel import ParallelContext


def main() -> int:
    arguments = parse_arguments()
    dist_env = dist_env_from(os.environ)
    return exit_code(lambda: evaluate(arguments, dist_env), dist_env)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="step_... directory, or the output directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument(
        "--records",
        required=True,
        metavar="FILE",
        help="LLaVA records (.json or .jsonl); the last turn of each is the expected answer",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="directory that image paths are relative to",
    )
    parser.add_argument("--out", metavar="FILE", help="also write scores and answers as JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="questions per forward pass (32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (32)"
    )
    return parser.parse_intermixed_args()  # options and overrides in any order


def evaluate(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Score the checkpoint; rank 0 prints and writes the result.

    Raises:
        UserError: An option, the checkpoint, the questions or an image cannot be used.
    """
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: use 1 or more.")
    # Imported here because torch and Megatron take seconds: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.evaluation.generate import Generator, checkpoint_config
    from moiie_megatron.evaluation.score import read_questions, score

    checkpoint = find_checkpoint(arguments.checkpoint)
    config = checkpoint_config(checkpoint, arguments.overrides)
    check_config(config, world_size=dist_env.world_size)
    questions = read_questions(arguments.records)[: arguments.limit]

    def body(context: ParallelContext) -> None:
        result = score(
            Generator.load(checkpoint, config, context),
            questions,
            arguments.images,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            show_progress=context.rank == 0 and sys.stdout.isatty(),
        )
        if context.rank != 0:
            return
        print_score(result)
        if arguments.out is not None:
            write_score(result, checkpoint, arguments)

    run_distributed(config, dist_env, body)


def print_score(result: Score) -> None:
    """One line per kind of question, and one for all."""
    for kind, part in [*result.by_kind().items(), ("all", result)]:
        print(
            f"{kind:>8}: {part.accuracy:6.1%} correct, {part.blanked_accuracy:6.1%} with blanked "
            f"images, {len(part.outcomes)} questions"
        )


def write_score(result: Score, checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Write scores and answers as JSON."""
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = {"checkpoint": str(checkpoint), "images": str(Path(arguments.images).absolute())}
    with atomic_write(out) as file:
        file.write_text(json.dumps({**source, **result.to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
