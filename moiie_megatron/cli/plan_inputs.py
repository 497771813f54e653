"""What tools/plan.py reads: a configuration of another machine, and what its run processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.expert_load import RoutedTokens
from moiie_megatron.planning.plans.jobs import Inputs
from moiie_megatron.planning.routing import RoutingAssumption, balanced, replayed, skewed
from moiie_megatron.planning.samples.data_report import read_report
from moiie_megatron.planning.samples.drawn_steps import BatchRules
from moiie_megatron.planning.samples.step_workload import workload_of
from moiie_megatron.planning.workload import Workload
from moiie_megatron.utils.errors import UserError

_SKEW = "skew="


class _AnyVariable(Mapping[str, str]):
    """An environment in which every variable is set: planning looks at no path."""

    def __getitem__(self, name: str) -> str:
        return name

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def read_unset_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A configuration whose variables need not be set and whose paths need not exist.

    Raises:
        UserError: See ``load_config``.
    """
    return load_config(path, overrides, _AnyVariable())


@dataclass(frozen=True)
class InputOptions:
    """Options of the command line.

    Attributes:
        report: File of a data report; None for samples of full length.
        images_per_sample: Of those; None for the default.
        routing: ``balanced``, ``skew=F``, or a file.
    """

    report: str | None
    images_per_sample: int | None
    routing: str


def make_inputs(config: RunConfig, options: InputOptions) -> Inputs:
    """What a run processes in any layout.

    Raises:
        UserError: A file or a number cannot be used.
    """
    report = None if options.report is None else read_report(options.report)
    skew = _skew(options.routing)
    known: dict[BatchRules, tuple[Workload, Workload]] = {}

    def workloads(layout: RunConfig, world: int) -> tuple[Workload, Workload]:
        replicas = world // (layout.parallel.tensor * layout.parallel.pipeline)
        rules = BatchRules.of(layout, replicas)
        if rules not in known:  # drawing steps takes a moment
            known[rules] = workload_of(
                layout,
                dp_size=replicas,
                report=report,
                images_per_sample=options.images_per_sample,
            )
        return known[rules]

    experts = config.moe.layout
    is_file = skew is None and options.routing != "balanced"
    replay = replayed(options.routing, experts, config.moe_layers) if is_file else None

    def routing(layout: RunConfig, typical: Workload) -> RoutingAssumption:
        if replay is not None:
            return replay
        if skew is None or not layout.moe_layers:
            return balanced(experts)
        images = RoutedTokens.of(typical.micro_batches, layout).image_fraction
        return skewed(experts, skew, layout.placement, images)

    return Inputs(workloads, routing)


def _skew(text: str) -> float | None:
    """The factor of ``skew=F``; None for other texts."""
    if not text.startswith(_SKEW):
        return None
    try:
        return float(text.removeprefix(_SKEW))
    except ValueError:
        raise UserError(f"--routing is {text!r}: use a number behind skew=.") from None
