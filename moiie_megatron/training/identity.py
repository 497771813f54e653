"""What makes a run this run: the values that may not change while it goes on.

The order of samples is a function of the seed and of the sources' sizes and weights, the
learning rates are one of the schedule, and the checkpoint has the tensors of one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.utils.errors import UserError

# Values by their place in the identity -> what the user knows them as; {} is a name or number.
_NAMES: Final = {
    "seed": "train.seed",
    "epoch_size": "the number of samples per epoch",
    "sources": "the number of data.sources",
    "sources.{}.size": "the number of samples in data.sources[{}]",
    "sources.{}.samples_per_epoch": "the samples per epoch of data.sources[{}] (its weight)",
    "loader.name": "data.loader",
    "loader.dp_ranks": "the number of data-parallel ranks",
    "loader.workers": "data.num_workers",
    "schedule.steps": "the number of steps (train.steps or train.epochs)",
    "schedule.learning_rates.{}": "stage.learning_rates.{}",
    "schedule.{}": "optimizer.{}",
    "experts.variant": "moe.variant",
    "experts.layers": "moe.layers",
    "experts.{}": "moe.num_{}_experts",
}


def run_identity(config: RunConfig, blend: Blend, steps: int, dp_size: int) -> dict[str, Any]:
    """The values by name, as checkpoints store them.

    Args:
        blend: The sources' sizes, and how many of their samples an epoch has.
        steps: Optimizer steps of the whole run.
        dp_size: Data-parallel ranks, which energon's order depends on.
    """
    optimizer, layout = config.optimizer, config.moe.layout
    loader: dict[str, Any] = {"name": config.data.loader}
    if config.data.loader == "energon":
        loader |= {"dp_ranks": dp_size, "workers": config.data.num_workers}
    experts: dict[str, Any] = {"variant": "dense"}
    if config.moe_layers:
        experts = {
            "variant": config.moe.variant,
            "vision": layout.num_vision,
            "shared": layout.num_shared,
            "text": layout.num_text,
            "layers": list(config.moe_layers),
        }
    return {
        "seed": config.train.seed,
        "epoch_size": blend.epoch_size,
        "sources": [
            {"size": size, "samples_per_epoch": count}
            for size, count in zip(blend.sizes, blend.counts, strict=True)
        ],
        "loader": loader,
        "schedule": {
            "steps": steps,
            "learning_rates": dict(config.stage.learning_rates),
            "warmup_ratio": optimizer.warmup_ratio,
            "min_lr_ratio": optimizer.min_lr_ratio,
            "weight_decay": optimizer.weight_decay,
        },
        "experts": experts,
    }


def check_same_run(saved: Mapping[str, Any], present: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        saved: The identity in the checkpoint; an older one may lack some of its sections, which
            are then not compared.
        present: The identity of this run.

    Raises:
        UserError: Samples would be repeated and others never seen, the learning rates would
            jump, or the model is another one.
    """
    before = dict(_leaves(saved))
    after = dict(_leaves({name: present.get(name) for name in saved}))
    for place in [*before, *(place for place in after if place not in before)]:
        old, new = before.get(place), after.get(place)
        if _written(old) == _written(new):
            continue
        raise UserError(
            f"{_name(place)} is {_shown(new)} but the checkpoint {checkpoint} was saved with "
            f"{_shown(old)}: restore it, or start a new run in another output directory "
            "(checkpoint.init_from takes the weights)."
        )


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no section, by its place; a list of sections also counts as a number."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{place}.{name}" if place else name)
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        yield place, len(node)
        for number, value in enumerate(node):
            yield from _leaves(value, f"{place}.{number}")
    else:
        yield place, node


def _written(value: Any) -> Any:
    """Real numbers to the six digits that older checkpoints have."""
    return f"{value:g}" if isinstance(value, float) else value


def _shown(value: Any) -> str:
    return "not set" if value is None else str(_written(value))


def _name(place: str) -> str:
    """What the user knows a value as."""
    words = place.split(".")
    for pattern, name in _NAMES.items():
        parts = pattern.split(".")
        if len(parts) == len(words) and all(
            part in ("{}", word) for part, word in zip(parts, words, strict=True)
        ):
            return name.format(*(w for p, w in zip(parts, words, strict=True) if p == "{}"))
    return place
