"""The sections about validation and evaluation while a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moiie_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    Text,
)


class ValidationSource(Section):
    """Held-out LLaVA records and the directory of their images."""

    records: Text = Field(description="file of LLaVA records (.json or .jsonl)")
    images: Text = Field(description="directory that image paths are relative to")
    name: Text | None = Field(
        None,
        description="name in logs: letters, digits, ., - and _; null: the name of the file without "
        "its suffix",
    )

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or Path(self.records).stem


class ValidationConfig(Section):
    """The loss on held-out samples while the run trains.

    See [training.md](training.md#validation-while-training).
    """

    sources: list[ValidationSource] = Field(
        [],
        description="held-out data sets, always plain records; a list, or the path of a YAML file "
        "with a list; without any nothing is validated",
    )
    interval: PositiveInt = Field(
        500, description="steps between validations; the last step is followed by one, too"
    )
    samples: PositiveInt | None = Field(
        1000, description="only the first samples of each source; null: all"
    )
    at_start: bool = Field(False, description="validate before the first step, too")


class EvaluationSet(Section):
    """Questions with expected answers, of which the exact matches are counted."""

    name: Text = Field(description="name in logs and files: letters, digits, - and _")
    records: Text = Field(
        description="file of LLaVA records (.json or .jsonl); the last turn is the expected answer"
    )
    images: Text = Field(description="directory that image paths are relative to")
    limit: PositiveInt | None = Field(None, description="only the first questions; null: all")


class EvaluationConfig(Section):
    """Evaluation of checkpoints while the run trains, by a process beside it.

    See [training.md](training.md#evaluation-while-training).
    """

    interval: NonNegativeInt = Field(
        0,
        description="steps between evaluated checkpoints, a multiple of checkpoint.interval; the "
        "last checkpoint is evaluated, too; 0: none",
    )
    sets: list[EvaluationSet] = Field([], description="small sets of questions on this machine")
    tasks: list[Text] = Field(
        [],
        description="benchmarks of `tools/evaluate.py --list`, evaluated by lmms-eval "
        "(`make eval-env`)",
    )
    task_data: str | None = Field(
        None,
        description="directory with the data sets of the tasks, as --data of tools/evaluate.py",
    )
    task_limit: PositiveInt | None = Field(
        None, description="only the first rows of every task; null: all"
    )
    process: bool = Field(
        True,
        description="the run starts the process, on the machine of its first rank; false: "
        "`tools/evaluate.py --watch OUTPUT` evaluates, on any machine",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: the CPU for the run's own process, for others a GPU if there is one",
    )
    threads: PositiveInt = Field(2, description="CPU threads of the run's own process")
    batch_size: PositiveInt = Field(8, description="questions per forward pass")
    max_new_tokens: PositiveInt = Field(32, description="longest answer to a question of a set")
    keep: NonNegativeInt = Field(
        1,
        description="number of exports to keep in OUTPUT/exports besides the best one",
    )
    wait_minutes: NonNegativeFloat = Field(
        10.0,
        description="at its end the run waits so long for its own process to evaluate what is left",
    )
