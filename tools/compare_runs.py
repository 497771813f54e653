"""Compare parallel layouts with a single process, or the losses of two runs.

``compare_runs.py layouts CONFIG [key=value ...]`` takes one optimizer step in many parallel
layouts, with every recompute mode, dispatcher and model variant, without packing.  It compares
losses, balance losses, all gradients and the updated weights with those of a single process,
checks that the ranks call collectives that fit together, and prints PASS or FAIL for each layout.
``compare_runs.py losses A B --assert-equal`` compares the losses of two runs, step by step, and
those of their validations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.overrides import parse_with_overrides
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import connect_store, dist_env_from
from moiie_megatron.mcore.process_lifetime import start_child, stop_launcher
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moiie_megatron.mcore.parallel import ParallelContext

RECOMPUTE = {
    "off": [],
    "full": [
        "megatron.recompute_granularity=full",
        "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1",
    ],
    "block": [
        "megatron.recompute_granularity=full",
        "megatron.recompute_method=block",
        "megatron.recompute_num_layers=1",  # of each pipeline stage
    ],
    "moe": ["megatron.recompute_granularity=selective", "megatron.recompute_modules=[moe]"],
}


# Adam divides by |g| + epsilon: with the usual epsilon, the rounding error of a gradient that is
# zero (a bias of the keys does not change the softmax) becomes as large a step as any other.
SMOOTH_ADAM = "optimizer.epsilon=1e-3"
DISPATCHERS = ("moiie", "alltoall", "allgather")
VARIANTS = ("vanilla", "modality", "moiie")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and options of one step to compare."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    recompute: str = "off"
    dispatcher: str = "moiie"
    variant: str | None = None  # None: the variant of the configuration

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        stages = f"PP{self.pipeline}" + (f" VPP{self.virtual}" if self.virtual > 1 else "")
        degrees = f"TP{self.tensor} {stages} EP{self.expert} ETP{self.expert_tensor}"
        rest = f"recompute {self.recompute} {self.dispatcher} {self.variant or ''}"
        return f"{degrees} DP{self.data} {rest}".rstrip()

    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual}",
            "parallel.pipeline_layers=null",
            f"parallel.expert={self.expert}",
            f"parallel.expert_tensor={self.expert_tensor}",
            f"moe.dispatcher={self.dispatcher}",
            # Data parallelism decides which samples share a packed row, and so a balance loss.
            "data.packing=false",
            *RECOMPUTE[self.recompute],
            *self._variant_overrides(),
        ]

    def _variant_overrides(self) -> list[str]:
        """Another variant has its default numbers of experts."""
        if self.variant is None:
            return []
        counts = [f"moe.num_{group}_experts=null" for group in ("vision", "shared", "text")]
        return [f"moe.variant={self.variant}", *counts]


def layouts(processes: int, own_variant: str) -> Iterator[Layout]:
    """All layouts, some of them twice.

    The grids of 1, 2, 4, ... processes, then virtual stages, recompute, dispatchers, variants.
    """
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= processes]
    degrees = (1, 2)
    for n, tensor, pipeline, expert, expert_tensor in itertools.product(
        sizes, degrees, degrees, (1, 2, 4), degrees
    ):
        dense, experts = tensor * pipeline, expert * expert_tensor * pipeline
        if n % dense or n % experts or (max(dense, experts) < n and n > 2):
            continue  # more data parallelism than the grid needs tests nothing new
        yield Layout(tensor, pipeline, 1, expert, expert_tensor, n // dense)
    virtual = [Layout(pipeline=2, virtual=2), Layout(pipeline=2, virtual=2, expert=2, data=2)]
    yield from (layout for layout in virtual if layout.processes <= processes)
    # EP2 on two processes; with PP2 or TP2 on four.
    mixed = [Layout(expert=2, data=2), Layout(pipeline=2, expert=2, data=2)]
    mixed += [Layout(tensor=2, expert=2, data=2)]
    for layout in (layout for layout in mixed if layout.processes <= processes):
        for recompute, dispatcher in itertools.product(RECOMPUTE, DISPATCHERS):
            yield replace(layout, recompute=recompute, dispatcher=dispatcher)
    for variant in (variant for variant in VARIANTS if variant != own_variant):
        yield Layout(variant=variant)
        for layout in (layout for layout in mixed if layout.processes <= processes):
            yield replace(layout, variant=variant)


def compare_layouts(arguments: argparse.Namespace) -> int:
    """Run all layouts, one torchrun per number of processes; return the exit code."""
    check_range(arguments, "processes", 1)
    check_range(arguments, "tolerance", 0)
    own_variant = load_config(arguments.config, arguments.overrides).moe.variant
    table = [
        layout
        for layout in dict.fromkeys(layouts(arguments.processes, own_variant))
        if _possible(arguments.config, [*arguments.overrides, *layout.overrides()], layout)
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        verdicts = Path(directory) / "verdicts"
        for processes in sorted({layout.processes for layout in table}):
            ours = [layout for layout in table if layout.processes == processes]
            job = Path(directory) / f"job{processes}.json"
            job.write_text(
                json.dumps(
                    {
                        "config": arguments.config,
                        "overrides": arguments.overrides,
                        "layouts": [asdict(layout) for layout in ours],
                        "references": directory,
                        "verdicts": str(verdicts),
                        "tolerance": arguments.tolerance,
                    }
                )
            )
            launcher = start_child(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    "--local-addr=localhost",  # the host name of a container may not resolve
                    *("--nproc-per-node", str(processes), __file__, "worker", str(job)),
                ]
            )
            try:
                launcher.wait()
            finally:
                stop_launcher(launcher, signal.SIGKILL, seconds=5)  # after an interruption
            done = verdicts.read_text().splitlines() if verdicts.exists() else []
            # If the launch died, some of its layouts have no verdict.
            failed += len(ours) - done.count("PASS")
            verdicts.unlink(missing_ok=True)
    print(f"{len(table) - failed} of {len(table)} layouts PASS", flush=True)
    return 1 if failed else 0


def _possible(config: str, overrides: Sequence[str], layout: Layout) -> bool:
    try:
        check_config(load_config(config, overrides), world_size=layout.processes)
    except UserError as reason:
        print(f"----  {layout.name}: {reason}", flush=True)
        return False
    return True


def run_worker(job_file: str) -> int:
    """What each process of a launch does: its layouts, one after the other."""
    import torch.distributed as dist

    from moiie_megatron.evaluation.collective_order import find_conflict
    from moiie_megatron.evaluation.collective_recorder import CollectiveRecorder, Event
    from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel

    job = json.loads(Path(job_file).read_text())
    dist_env = dist_env_from(os.environ)
    store = connect_store(dist_env)
    for number, values in enumerate(job["layouts"]):
        layout = Layout(**values)
        config = load_config(job["config"], [*job["overrides"], *layout.overrides()])
        context = init_parallel(
            config.active_parallel,
            dist_env,
            device=config.train.device,
            store=dist.PrefixStore(f"layout{number}", store),
        )
        reference = Path(job["references"]) / f"{layout.variant}.pt"
        with CollectiveRecorder() as recorder:
            verdict, text = compare_step(config, context, reference, job["tolerance"])
        records: list[list[Event]] = [[]] * context.size
        dist.gather_object(recorder.events, records if context.rank == 0 else None)
        if context.rank == 0:
            conflict = find_conflict(records)
            if conflict is not None:
                verdict, text = "FAIL", f"the ranks' collectives do not fit together: {conflict}"
            print(f"{verdict}  {layout.name}: {text}", flush=True)
            with Path(job["verdicts"]).open("a") as verdicts:
                verdicts.write(verdict + "\n")
        destroy_parallel()
    return 0


def compare_step(
    config: RunConfig, context: ParallelContext, reference_file: Path, tolerance: float
) -> tuple[str, str]:
    """Take one step and compare it with the reference, or write the reference if there is none.

    Returns:
        PASS or FAIL and an explanation; on ranks other than 0 it has no meaning.
    """
    import torch

    from moiie_megatron.evaluation.layout_equivalence import ShardMismatch, differences

    reference = torch.load(reference_file) if reference_file.exists() else None
    try:
        record = take_step(config, context, reference)
    except (ShardMismatch, UserError) as error:
        return "FAIL", str(error)
    if record is None or reference is None:
        if record is not None:
            torch.save(record, reference_file)
        return "PASS", "reference"
    worst = differences(record, reference)
    wrong = [name for difference, name in worst.values() if not difference <= tolerance]
    text = "  ".join(f"{kind} {difference:.1e}" for kind, (difference, _) in worst.items())
    return ("FAIL", f"{text}  (worst: {', '.join(wrong)})") if wrong else ("PASS", text)


def take_step(
    config: RunConfig, context: ParallelContext, reference: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """One recorded step, from the weights of the reference if there is one."""
    from moiie_megatron.data.stream.build import build_dataset, build_train_loader
    from moiie_megatron.evaluation.layout_equivalence import record_step

    loader = build_train_loader(
        config,
        build_dataset(config),
        consumed_samples=0,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
        ranks=context,
    )
    if reference is None:
        return record_step(config, context, next(loader), None)
    known = reference

    def weights(name: str, expert: int | None) -> Tensor:
        tensor = known[f"start/{name}"]
        return tensor if expert is None else tensor[expert]

    return record_step(config, context, next(loader), weights)


def compare_losses(arguments: argparse.Namespace) -> int:
    """Compare the losses of two runs, also those of validations; return the exit code."""
    from moiie_megatron.analysis.records import read_metrics
    from moiie_megatron.analysis.validations import read_validations

    check_range(arguments, "tolerance", 0)
    runs, validations = [], []
    for name in (arguments.a, arguments.b):
        path = Path(name)
        path = path / "metrics.jsonl" if path.is_dir() else path
        if not path.exists():
            raise UserError(
                f"{path} does not exist: name two output directories or metrics.jsonl files."
            )
        runs.append({f"step {x['step']}": x["lm_loss"] for x in read_metrics(path, ["lm_loss"])})
        validations.append(
            {
                f"validation of step {line['step']}, {part}": loss
                for line in read_validations(path.parent).curves
                for part, loss in line.items()
                if part != "step"
            }
        )
    same = _compare("steps", runs[0], runs[1], arguments.tolerance)
    if all(validations):
        same &= _compare("validation losses", validations[0], validations[1], arguments.tolerance)
    return 1 if arguments.assert_equal and not same else 0


def _compare(
    what: str, first: dict[str, float], second: dict[str, float], tolerance: float
) -> bool:
    """Print where the losses of two runs differ; return whether they have the same, all near."""
    common = [name for name in first if name in second]
    print(f"{len(common)} common {what} of {len(first)} and {len(second)}")
    worst = 0.0
    for name in common:
        a, b = first[name], second[name]
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        difference = abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf
        worst = max(worst, difference)
        if difference > tolerance:
            print(f"{name}: {a:.6f} and {b:.6f}")
    print(f"largest difference {worst:.3e}")
    return bool(common) and first.keys() == second.keys() and worst <= tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    table = commands.add_parser(
        "layouts", help="one step in many layouts, compared with one process"
    )
    table.add_argument("config")
    table.add_argument("overrides", nargs="*", metavar="key=value")
    table.add_argument("--processes", type=int, default=8, help="largest number of processes (8)")
    table.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest difference, relative to the largest value of a tensor (1e-3)",
    )
    losses = commands.add_parser("losses", help="the losses of two runs, step by step")
    losses.add_argument("a", metavar="A", help="output directory or metrics.jsonl")
    losses.add_argument("b", metavar="B", help="output directory or metrics.jsonl")
    losses.add_argument("--tolerance", type=float, default=0.0, help="largest difference (0)")
    losses.add_argument("--assert-equal", action="store_true", help="exit with 1 if they differ")
    worker = commands.add_parser("worker", help=argparse.SUPPRESS)
    worker.add_argument("job")
    arguments = parse_with_overrides(parser)
    arguments.overrides = [SMOOTH_ADAM, *getattr(arguments, "overrides", [])]
    codes: list[int] = []

    def task() -> None:
        if arguments.command == "layouts":
            codes.append(compare_layouts(arguments))
        elif arguments.command == "worker":
            codes.append(run_worker(arguments.job))
        else:
            codes.append(compare_losses(arguments))

    return exit_code(task, dist_env_from(os.environ)) or codes[0]


if __name__ == "__main__":
    run_program(main)
