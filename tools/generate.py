"""Answer one prompt, or those of a file, with the model in a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.checkpoint.manifest import MANIFEST_FILE
from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.digest import file_digest
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.config.schema import RunConfig
    from moiie_megatron.generation.requests import Request
    from moiie_megatron.generation.results_file import ResultsFile
    from moiie_megatron.generation.sampling import Sampling
    from moiie_megatron.mcore.parallel import ParallelContext


def main() -> int:
    arguments = parse_arguments()
    dist_env = dist_env_from(os.environ)
    return exit_code(lambda: generate(arguments, dist_env), dist_env)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="step_... directory, or the output directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument("--prompt", help="text of the user; the answer is printed")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image of the prompt; may be repeated",
    )
    parser.add_argument(
        "--records",
        metavar="FILE",
        help="prompts, one JSON object per line: prompt (or text) and image, or a LLaVA record",
    )
    parser.add_argument("--images", metavar="DIR", help="directory of the images of --records")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="answers to --records, one JSON object per line; it appears when it is complete, and "
        "after an interruption the same command goes on",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="records per forward pass (32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw among so many most likely tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the most likely tokens of this probability together (1.0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="what is drawn depends on it (0)"
    )
    return parser.parse_intermixed_args()  # options and overrides in any order


def generate(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Answer one prompt or a file of them; rank 0 prints or writes the result.

    Raises:
        UserError: An option, the checkpoint, the records or the output cannot be used.
    """
    check_options(arguments)
    # Imported here because torch and Megatron take seconds: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.generation.checkpoint_config import checkpoint_config
    from moiie_megatron.generation.requests import read_requests
    from moiie_megatron.generation.sampling import Sampling

    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, seed=arguments.seed
    )
    checkpoint = find_checkpoint(arguments.checkpoint)
    config = checkpoint_config(checkpoint, arguments.overrides)
    check_config(config, world_size=dist_env.world_size)
    if arguments.records is None:
        answer_prompt(arguments, dist_env, checkpoint, config, sampling)
        return
    requests = read_requests(arguments.records)
    answer_records(arguments, dist_env, checkpoint, config, sampling, requests)


def check_options(arguments: argparse.Namespace) -> None:
    """Check what belongs together.

    Raises:
        UserError: Options of both kinds, of none, or out of range.
    """
    if (arguments.prompt is None) == (arguments.records is None):
        raise UserError("--prompt and --records: give exactly one of them.")
    of_records = {"--images": arguments.images, "--out": arguments.out}
    if arguments.records is None:
        for name, value in of_records.items():
            if value is not None:
                raise UserError(f"{name} is {value}, which belongs to --records: leave it out.")
    elif None in of_records.values() or arguments.image:
        raise UserError("--records needs --images DIR and --out FILE, and takes no --image.")
    for name in ("batch_size", "max_new_tokens"):
        check_range(arguments, name, 1)
    for image in arguments.image:
        if not Path(image).is_file():
            raise UserError(f"--image is {image}, which does not exist: name an image file.")
    if arguments.images is not None and not Path(arguments.images).is_dir():
        raise UserError(f"--images is {arguments.images}: name the directory of the images.")


def answer_prompt(
    arguments: argparse.Namespace,
    dist_env: DistEnv,
    checkpoint: Path,
    config: RunConfig,
    sampling: Sampling,
) -> None:
    """Print the answer to ``--prompt``."""
    from moiie_megatron.data.records.record import PLACEHOLDER, Turn
    from moiie_megatron.generation.generator import Generator

    def body(context: ParallelContext) -> None:
        generator = Generator.load(checkpoint, config, context)
        files = [Path(image) for image in arguments.image]
        images = [generator.image_loader(file.parent).load(file.name) for file in files]
        text = arguments.prompt
        if PLACEHOLDER not in text:
            text = f"{PLACEHOLDER}\n" * len(images) + text
        prompt = generator.prompt([Turn("user", text)], images)
        (reply,) = generator.answer([prompt], arguments.max_new_tokens, sampling)
        if context.rank == 0:
            print(reply)

    run_distributed(config, dist_env, body)


def answer_records(
    arguments: argparse.Namespace,
    dist_env: DistEnv,
    checkpoint: Path,
    config: RunConfig,
    sampling: Sampling,
    requests: list[Request],
) -> None:
    """Write the answers to ``--records`` to ``--out``."""
    from moiie_megatron.generation.answer_requests import answer_requests
    from moiie_megatron.generation.generator import Generator
    from moiie_megatron.generation.results_file import ResultsFile
    from moiie_megatron.mcore.inference.stages import from_rank_0

    file: ResultsFile | None = None
    done = 0
    if dist_env.rank == 0:
        file = ResultsFile(arguments.out, identity(checkpoint, arguments, sampling))
        done = file.count()
        if done:
            print(f"{arguments.out}: going on behind {done} answers.", flush=True)

    def body(context: ParallelContext) -> None:
        answered = from_rank_0(done, context)
        batches = answer_requests(
            Generator.load(checkpoint, config, context),
            requests,
            arguments.images,
            first=answered,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
        )
        is_first = context.rank == 0
        with progress_bar("answering", "records") if is_first else nullcontext(None) as progress:
            for batch in batches:
                answered += len(batch)
                if file is not None:
                    file.append(batch)
                if progress is not None:
                    progress(answered, len(requests))

    run_distributed(config, dist_env, body)
    if file is not None:
        report(file, arguments)


def identity(checkpoint: Path, arguments: argparse.Namespace, sampling: Sampling) -> str:
    """Digest of what the answers depend on."""
    manifest = checkpoint / MANIFEST_FILE
    parts = (
        str(checkpoint.absolute()),
        manifest.read_text() if manifest.exists() else "",
        file_digest(Path(arguments.records)),
        str(Path(arguments.images).absolute()),
        str(arguments.max_new_tokens),
        repr(sampling),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def report(file: ResultsFile, arguments: argparse.Namespace) -> None:
    """Put the file in its place; say what is in it."""
    results = file.finish()
    failed = [result for result in results if "error" in result]
    print(f"{arguments.out}: {len(results) - len(failed)} answers, {len(failed)} errors")
    if failed:
        print(f"The first error is of {failed[0]['id']}: {failed[0]['error']}")


if __name__ == "__main__":
    run_program(main)
