"""Answer one prompt, with or without images, with the model in a checkpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="step_... directory, or the output directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument("--prompt", required=True, help="text of the user")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image of the prompt; may be repeated",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)"
    )
    arguments = parser.parse_intermixed_args()  # options and overrides in any order

    # Imported here because torch and Megatron take seconds: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.data.records.record import PLACEHOLDER, Turn
    from moiie_megatron.generation.checkpoint_config import checkpoint_config
    from moiie_megatron.generation.generator import Generator
    from moiie_megatron.mcore.parallel import ParallelContext

    dist_env = dist_env_from(os.environ)

    def task() -> None:
        check_range(arguments, "max_new_tokens", 1)
        for image in arguments.image:
            if not Path(image).is_file():
                raise UserError(f"--image is {image}, which does not exist: name an image file.")
        directory = find_checkpoint(arguments.checkpoint)
        config = checkpoint_config(directory, arguments.overrides)
        check_config(config, world_size=dist_env.world_size)

        def answer(context: ParallelContext) -> None:
            generator = Generator.load(directory, config, context)
            files = [Path(image) for image in arguments.image]
            images = [generator.image_loader(file.parent).load(file.name) for file in files]
            text = arguments.prompt
            if PLACEHOLDER not in text:
                text = f"{PLACEHOLDER}\n" * len(images) + text
            prompt = generator.prompt([Turn("user", text)], images)
            (reply,) = generator.answer([prompt], arguments.max_new_tokens)
            if context.rank == 0:
                print(reply)

        run_distributed(config, dist_env, answer)

    return exit_code(task, dist_env)


if __name__ == "__main__":
    run_program(main)
