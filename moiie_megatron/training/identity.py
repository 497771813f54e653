"""The identity of a run: the values that must not change when it resumes.

The order of samples is a function of the seed and of the sources' sizes and weights, the
learning rates are one of the schedule, and a checkpoint fits one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.utils.errors import UserError

# Path of a value in the identity -> its name in messages; {} stands for any key or index.
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
    """The identity of a run, as its checkpoints store it.

    Args:
        blend: Sizes of the sources, and their samples per epoch.
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
    """Refuse to resume from a checkpoint of another run.

    Args:
        saved: The identity in the checkpoint; an older one may lack some of its sections, which
            are then not compared.
        present: The identity of this run.

    Raises:
        UserError: They differ: samples would be repeated or never seen, the learning rates would
            jump, or the model has other tensors.
    """
    before = dict(_leaves(saved))
    after = dict(_leaves({name: present.get(name) for name in saved}))
    for path in [*before, *(path for path in after if path not in before)]:
        old, new = before.get(path), after.get(path)
        if _written(old) == _written(new):
            continue
        raise UserError(
            f"{_name(path)} is {_shown(new)} but the checkpoint {checkpoint} was saved with "
            f"{_shown(old)}: restore it, or start a new run in another output directory "
            "(checkpoint.init_from takes the weights)."
        )


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every leaf; a list of mappings also gives its length."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        yield path, len(node)
        for number, value in enumerate(node):
            yield from _leaves(value, f"{path}.{number}")
    else:
        yield path, node


def _written(value: Any) -> Any:
    """Floats with the six significant digits that checkpoints of format version 1 have."""
    return f"{value:g}" if isinstance(value, float) else value


def _shown(value: Any) -> str:
    return "not set" if value is None else str(_written(value))


def _name(path: str) -> str:
    """The name of a value in messages."""
    words = path.split(".")
    for pattern, name in _NAMES.items():
        parts = pattern.split(".")
        if len(parts) == len(words) and all(
            part in ("{}", word) for part, word in zip(parts, words, strict=True)
        ):
            return name.format(*(w for p, w in zip(parts, words, strict=True) if p == "{}"))
    return path
