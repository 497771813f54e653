"""How far a run is and what makes it this run, as stored in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moiie_megatron.checkpoint.older_progress import identity_from_sentences

# Field names of earlier checkpoints -> today's.
_RENAMED = {"bad_samples": "skipped_samples", "skipped": "skipped_steps"}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done, skipped ones included.
        consumed_samples: Samples that these steps have used, on all ranks.
        identity: What the order of samples, the schedule and the model depend on: numbers,
            strings, lists and dictionaries (``training/identity.py``).
        skipped_samples: Samples that could not be used so far, on all ranks.
        skipped_steps: Steps that changed nothing, because loss or gradient was not finite.
    """

    step: int
    consumed_samples: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    skipped_samples: int = 0
    skipped_steps: int = 0

    @property
    def updates(self) -> int:
        """Steps in which the optimizer changed the weights."""
        return self.step - self.skipped_steps

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint; ``from_state`` reads it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """The progress in a checkpoint of this version or an earlier one.

        Raises:
            UserError: An earlier version's description of the run cannot be read.
        """
        values = {_RENAMED.get(name, name): value for name, value in state.items()}
        names = ("step", "consumed_samples", "skipped_samples", "skipped_steps")
        identity = values["identity"] if "identity" in values else identity_from_sentences(values)
        return cls(identity=identity, **{name: values[name] for name in names if name in values})
