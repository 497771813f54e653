"""Evaluate: exact-match accuracy of a checkpoint on a LLaVA question file, and without pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="step_... folder, or the output folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument("--records", required=True, help="LLaVA .jsonl; last turn: the answer")
    parser.add_argument("--images", required=True, help="folder of the image paths")
    parser.add_argument("--out", metavar="FILE", help="write the scores and all answers as JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    # Options and overrides may come in any order.
    arguments = parser.parse_intermixed_args()

    # Heavy imports after the arguments: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.evaluation.generate import Generator, checkpoint_config
    from moiie_megatron.evaluation.score import Score, read_questions, score
    from moiie_megatron.mcore.parallel import ParallelContext

    dist_env = dist_env_from(os.environ)

    def report(result: Score, folder: Path) -> None:
        for kind, part in [*result.by_kind().items(), ("all", result)]:
            print(
                f"{kind:>8}: {part.accuracy:6.1%} right, {part.blanked_accuracy:6.1%} with blank "
                f"pictures, {len(part.outcomes)} questions"
            )
        if arguments.out is None:
            return
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(out.name + ".writing")
        sources = {"checkpoint": str(folder), "images": str(Path(arguments.images).absolute())}
        beside.write_text(json.dumps({**sources, **result.to_json()}, indent=1) + "\n")
        os.replace(beside, out)

    def task() -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: use 1 or more.")
        folder = find_checkpoint(arguments.checkpoint)
        config = checkpoint_config(folder, arguments.overrides)
        check_config(config, world_size=dist_env.world_size)
        questions = read_questions(arguments.records)[: arguments.limit]

        def evaluate(context: ParallelContext) -> None:
            result = score(
                Generator.load(folder, config, context),
                questions,
                arguments.images,
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                show_progress=context.rank == 0 and sys.stdout.isatty(),
            )
            if context.rank == 0:
                report(result, folder)

        run_distributed(config, dist_env, evaluate)

    return exit_code(task, dist_env)


if __name__ == "__main__":
    sys.exit(main())
