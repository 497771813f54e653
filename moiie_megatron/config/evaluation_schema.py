"""The section about evaluation while a run trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moiie_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    Text,
)


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
