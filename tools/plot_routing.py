"""Plot which experts process image tokens and text tokens in each layer.

``plot_routing.py RUN`` plots the routing.jsonl of a training run: token pathways, fractions of
intra-modality and shared experts, load of every expert over training.  ``plot_routing.py FILE --out
DIR`` plots what accuracy.py or evaluate.py wrote with --routing.

``plot_routing.py CHECKPOINT --out DIR`` (or RUN with --records) runs samples through the model
without training it, writes a routing.jsonl, and plots the first two; also under torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

LOG = "routing.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", help="output directory of a run, a step_... directory, or a routing.jsonl"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.expert=2")
    parser.add_argument("--out", metavar="DIR", help="output directory; default: RUN/routing")
    parser.add_argument(
        "--last",
        type=int,
        default=50,
        metavar="N",
        help="final steps of a run to average over (50)",
    )
    parser.add_argument(
        "--records", metavar="FILE", help="LLaVA records to run; default: the data of the run"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="directory that image paths in --records are relative to"
    )
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="number of samples to run (256)"
    )
    arguments = parser.parse_intermixed_args()  # options and overrides in any order
    dist_env = dist_env_from(os.environ)
    target = Path(arguments.target)
    log = target if target.is_file() else target / LOG
    measures = arguments.records is not None or not log.exists()

    def task() -> None:
        if not target.exists():
            raise UserError(f"{target} does not exist: name a run, a checkpoint or a file.")
        for name in ("last", "samples"):
            check_range(arguments, name, 1)
        if (arguments.records is None) != (arguments.images is None):
            raise UserError("--records and --images are used together: give both or neither.")
        if target.is_file():
            check_file(arguments)
        if measures and arguments.out is None:
            raise UserError(
                f"{target} has no {LOG} to plot, or --records is given: name an output directory "
                "with --out."
            )
        out = Path(arguments.out) if arguments.out else target / "routing"
        if measures and (out / "metrics.jsonl").exists():
            raise UserError(
                f"--out is {out}, the directory of a run, whose {LOG} would be replaced: name "
                "another one."
            )
        if measures:
            measure(arguments, dist_env, out)
        if dist_env.rank == 0:
            draw(out / LOG if measures else log, out, arguments.last)

    return exit_code(task, dist_env)


def check_file(arguments: argparse.Namespace) -> None:
    """Refuse what makes no sense for a file of records.

    Raises:
        UserError: An option of a checkpoint, or no output directory.
    """
    given = [*arguments.overrides, *(["--records"] if arguments.records is not None else [])]
    if given:
        raise UserError(
            f"{given[0]} is for checkpoints but {arguments.target} is a file: leave it out."
        )
    if arguments.out is None:
        raise UserError(f"{arguments.target} is a file: name an output directory with --out.")


def draw(file: Path, out: Path, last: int) -> None:
    """Write the figures of a routing.jsonl."""
    from moiie_megatron.analysis.routing.plots import plot_routing
    from moiie_megatron.routing_stats.reading import read_routing

    for figure in plot_routing(read_routing(file), out, last=last):
        print(figure)


def measure(arguments: argparse.Namespace, dist_env: DistEnv, out: Path) -> None:
    """Run samples through a checkpoint and write the routing record to ``out/routing.jsonl``."""
    # Imported here because plotting a log needs no Megatron.
    from moiie_megatron.checkpoint.directory import find_checkpoint
    from moiie_megatron.checkpoint.load_weights import load_weights
    from moiie_megatron.data.stream.build import build_dataset
    from moiie_megatron.data.stream.dataset import LlavaDataset
    from moiie_megatron.evaluation.routing import measure_routing
    from moiie_megatron.generation.checkpoint_config import checkpoint_config
    from moiie_megatron.mcore.parallel import ParallelContext
    from moiie_megatron.vlm.build import build_model

    checkpoint = find_checkpoint(arguments.target)
    overrides = list(arguments.overrides)
    if arguments.records is not None:
        source = {"records": arguments.records, "images": arguments.images}
        overrides += [f"data.sources={json.dumps([source])}", "data.loader=plain"]
    config = checkpoint_config(checkpoint, overrides)
    if config.data.loader != "plain":
        raise UserError(
            f"{checkpoint} was trained on shards (data.loader is {config.data.loader}): name "
            "records and their images with --records and --images."
        )
    check_config(config, world_size=dist_env.world_size)
    dataset = build_dataset(config)
    assert isinstance(dataset, LlavaDataset)  # what the plain loader reads

    def body(context: ParallelContext) -> None:
        model = build_model(config, context)
        load_weights(checkpoint, context, model)
        record = measure_routing(config, context, model, dataset, arguments.samples)
        if record is None:
            return
        sources = [source.model_dump() for source in config.data.sources]
        record |= {"checkpoint": str(checkpoint), "sources": sources}
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / LOG) as file:
            file.write_text(json.dumps(record) + "\n")
        print(
            f"{record['samples']} samples routed, {record['skipped_samples']} unreadable",
            flush=True,
        )

    run_distributed(config, dist_env, body)


if __name__ == "__main__":
    run_program(main)
