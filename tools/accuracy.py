"""Answer questions; where the file has the answers, measure exact-match accuracy."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.checkpoint.manifest import MANIFEST_FILE
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

if TYPE_CHECKING:
    from moiie_megatron.evaluation.answers_file import AnswersFile
    from moiie_megatron.evaluation.questions import Question
    from moiie_megatron.evaluation.score import Outcome, Score
    from moiie_megatron.mcore.parallel import ParallelContext
    from moiie_megatron.utils.progress import ProgressFn


def main() -> int:
    arguments = parse_arguments()
    dist_env = dist_env_from(os.environ)
    return exit_code(lambda: evaluate(arguments, dist_env), dist_env)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", help="step_... directory, output directory of a run, or exported directory"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument(
        "--records",
        required=True,
        metavar="FILE",
        help="LLaVA records, of which the last turn is the expected answer, or one of LLaVA's "
        "question files (.json or .jsonl)",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="directory that image paths are relative to",
    )
    parser.add_argument("--out", metavar="FILE", help="write scores and answers as JSON")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="LLaVA answers file (.jsonl), written while questions are answered; the same command "
        "goes on from it (default: OUT.answers.jsonl with --out, else none)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="questions per forward pass (32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (32)"
    )
    exports = parser.add_argument_group("exports")
    exports.add_argument("--device", metavar="NAME", help="cpu, cuda ... (default: a GPU if any)")
    exports.add_argument("--expert", metavar="NAME", help="this expert alone, as shared.0")
    exports.add_argument(
        "--routing", metavar="FILE", help="write which experts the tokens take (routing.jsonl)"
    )
    return parser.parse_intermixed_args()  # options and overrides in any order


def evaluate(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Answer the questions; rank 0 prints and writes the result.

    Raises:
        UserError: An option, the checkpoint, the questions or an output cannot be used.
    """
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: use 1 or more.")
    if (Path(arguments.checkpoint) / "config.json").is_file():
        evaluate_export(arguments, dist_env)
    else:
        evaluate_checkpoint(arguments, dist_env)


def evaluate_checkpoint(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Ask a checkpoint, with Megatron-Core."""
    # Imported here because torch and Megatron take seconds: --help answers at once.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.evaluation.ask import ask
    from moiie_megatron.generation.checkpoint_config import checkpoint_config
    from moiie_megatron.generation.generator import Generator
    from moiie_megatron.mcore.inference.stages import from_rank_0

    for name in ("device", "expert", "routing"):
        value = getattr(arguments, name)
        if value is not None:
            raise UserError(
                f"--{name} is {value} but {arguments.checkpoint} is no export: write one with "
                "tools/convert.py export, or leave the option out."
            )
    checkpoint = find_checkpoint(arguments.checkpoint)
    config = checkpoint_config(checkpoint, arguments.overrides)
    check_config(config, world_size=dist_env.world_size)
    questions = checked_questions(arguments)
    file: AnswersFile | None = None
    done: list[Outcome] = []
    if dist_env.rank == 0:
        file, done = open_answers(arguments, checkpoint, questions, manifest_text(checkpoint))

    def body(context: ParallelContext) -> None:
        first = from_rank_0(len(done), context)
        batches = ask(
            Generator.load(checkpoint, config, context),
            questions[first:],
            arguments.images,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
        )
        is_first = context.rank == 0
        with progress_bar("answering", "records") if is_first else nullcontext(None) as progress:
            outcomes = collect(batches, done, len(questions), file, progress)
        if is_first:
            report(outcomes, checkpoint, arguments)

    run_distributed(config, dist_env, body)


def evaluate_export(arguments: argparse.Namespace, dist_env: DistEnv) -> None:
    """Ask an export, with transformers."""
    from moiie_megatron.evaluation.ask_export import ask_export
    from moiie_megatron.evaluation.benchmarks.target import ExportTarget
    from moiie_megatron.exported.load import check_export
    from moiie_megatron.exported.model import ExportedModel
    from moiie_megatron.exported.routing import RoutingRecorder

    folder = check_export(arguments.checkpoint)
    if arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]} is for checkpoints but {folder} is an export: leave it out."
        )
    if dist_env.world_size > 1:
        raise UserError(
            f"{dist_env.world_size} processes were started but {folder} is an export: start one."
        )
    if arguments.expert is not None and arguments.routing is not None:
        raise UserError(
            f"--routing is {arguments.routing} but with --expert nothing is routed: give one."
        )
    questions = checked_questions(arguments)
    contents = json.dumps(ExportTarget(folder, expert=arguments.expert).identity())
    file, done = open_answers(arguments, folder, questions, contents)
    model = ExportedModel.load(folder, device=arguments.device or "auto", expert=arguments.expert)
    recorder = RoutingRecorder(model.model) if arguments.routing is not None else None
    if recorder is not None and done:
        recorder.add_saved(arguments.routing)
    batches = ask_export(
        model,
        questions[len(done) :],
        arguments.images,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        recorder=recorder,
    )

    def save_routing() -> None:
        if recorder is not None:
            recorder.save(arguments.routing, records=str(arguments.records))

    with progress_bar("answering", "records") as progress:
        outcomes = collect(batches, done, len(questions), file, progress, save_routing)
    report(outcomes, folder, arguments)
    if recorder is not None:
        print(f"tools/plot_routing.py {arguments.routing} --out DIR draws the experts.")


def checked_questions(arguments: argparse.Namespace) -> list[Question]:
    """The questions, whose images and whose results have a place.

    Raises:
        UserError: They cannot be asked, or a result cannot be written.
    """
    from moiie_megatron.evaluation.asking import check_images
    from moiie_megatron.evaluation.questions import read_questions

    questions = read_questions(arguments.records)[: arguments.limit]
    check_images(questions, arguments.images)
    check_destinations(arguments, questions[0].expected is not None)
    return questions


def collect(
    batches: Iterable[list[Outcome]],
    done: list[Outcome],
    total: int,
    file: AnswersFile | None,
    progress: ProgressFn | None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """All outcomes, kept as they come."""
    outcomes = list(done)
    for batch in batches:
        outcomes += batch
        if file is not None:
            file.append(batch)
        after_batch()
        if progress is not None:
            progress(len(outcomes), total)
    return outcomes


def check_destinations(arguments: argparse.Namespace, has_answers: bool) -> None:
    """Check what is written at the end, before the work.

    Raises:
        UserError: A file cannot be written, or the questions have no answers to score.
    """
    from moiie_megatron.evaluation.answers_file import check_writable

    if not has_answers and (arguments.out is not None or arguments.answers is None):
        raise UserError(
            f"{arguments.records} has questions without answers, which have no scores: use "
            "--answers FILE, and no --out."
        )
    for path in (arguments.out, arguments.answers, arguments.routing):
        if path is not None:
            check_writable(Path(path))


def open_answers(
    arguments: argparse.Namespace, model: Path, questions: list[Question], contents: str
) -> tuple[AnswersFile | None, list[Outcome]]:
    """The file that answers are kept in, and the answers that it has already.

    Args:
        arguments: Of the program.
        model: Checkpoint or export.
        questions: What is asked.
        contents: Changes with the model's weights.

    Raises:
        UserError: ``--answers`` is a file of another evaluation.
    """
    from moiie_megatron.evaluation.answers_file import AnswersFile

    path = arguments.answers or (arguments.out and f"{arguments.out}.answers.jsonl")
    if path is None:
        return None, []
    file = AnswersFile(path, model.name, evaluation_id(model, arguments, contents))
    try:
        done = file.read(questions)
    except UserError:
        if arguments.answers is not None:
            raise
        file.path.unlink()  # belongs to the scores that are about to be replaced
        return file, []
    if done:
        print(f"{path} holds {len(done)} answers already: going on from them.", flush=True)
    return file, done


def evaluation_id(model: Path, arguments: argparse.Namespace, contents: str) -> str:
    """Digest of what the answers depend on besides the questions."""
    parts = (
        str(model.absolute()),
        contents,
        str(Path(arguments.images).absolute()),
        str(arguments.max_new_tokens),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def manifest_text(checkpoint: Path) -> str:
    """What changes with the weights of a checkpoint."""
    manifest = checkpoint / MANIFEST_FILE
    return manifest.read_text() if manifest.exists() else ""


def report(outcomes: list[Outcome], checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Print the score and write it as JSON; name what could not be asked."""
    from moiie_megatron.evaluation.score import Score

    if outcomes[0].expected is None:
        print(f"{len(outcomes)} questions answered: {arguments.answers}")
    else:
        result = Score(tuple(outcomes))
        print_score(result)
        if arguments.out is not None:
            write_score(result, checkpoint, arguments)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        print(
            f"{len(failed)} questions could not be asked and count as wrong, the first "
            f"{failed[0].id}: {failed[0].error}"
        )


def print_score(result: Score) -> None:
    """One line per kind of question, and one for all."""
    for kind, part in [*result.by_kind().items(), ("all", result)]:
        print(
            f"{kind:>8}: {part.accuracy:6.1%} correct, {part.blanked_accuracy:6.1%} with blanked "
            f"images, {len(part.outcomes)} questions"
        )


def write_score(result: Score, checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Write scores and answers as JSON."""
    source = {"checkpoint": str(checkpoint), "images": str(Path(arguments.images).absolute())}
    if arguments.expert is not None:
        source["expert"] = arguments.expert
    with atomic_write(arguments.out) as file:
        file.write_text(json.dumps({**source, **result.to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
