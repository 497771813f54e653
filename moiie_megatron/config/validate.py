"""Conditions on a whole configuration; the schema checks single values.

Every violated condition is one ``UserError`` sentence with the keys, their values and the remedy.
Only ``check_paths`` reads the disk.
"""

from __future__ import annotations

import re

from moiie_megatron.config.families import template_names
from moiie_megatron.config.megatron_section.check_model import check_megatron
from moiie_megatron.config.megatron_section.check_training import check_training_sections
from moiie_megatron.config.messages import listed
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate_data import (
    check_data,
    check_exists,
    check_loader,
    check_packing,
    check_source_paths,
    check_validation,
)
from moiie_megatron.config.validate_model import check_experts, check_language, check_vision
from moiie_megatron.config.validate_parallel import check_parallel, check_world
from moiie_megatron.utils.errors import UserError


def check_config(config: RunConfig, *, world_size: int | None = None) -> None:
    """Refuse combinations of values that cannot run.

    Args:
        config: The run.
        world_size: Number of ranks; None skips the conditions that depend on it.

    Raises:
        UserError: The first impossible combination.
    """
    check_language(config)
    check_vision(config)
    check_experts(config)
    _check_stage(config)
    check_megatron(config)
    check_training_sections(config)
    check_parallel(config)
    check_data(config)
    check_packing(config)
    check_loader(config)
    check_validation(config)
    _check_train(config)
    _check_evaluation(config)
    if world_size is not None:
        check_world(config, world_size)


def check_paths(config: RunConfig) -> None:
    """Refuse paths that do not exist; relative ones start at the current directory.

    A run needs data sources; the configuration of a converted checkpoint has none.

    Raises:
        UserError: There is no source, or a file or directory is missing.
    """
    if not config.data.sources:
        raise UserError("data.sources is empty: give at least one source of records and images.")
    check_exists("data.tokenizer", config.data.tokenizer, "a tokenizer directory or .model file")
    check_source_paths(config)
    for key, path in (
        ("language.pretrained", config.language.pretrained),
        ("vision.pretrained", config.vision.pretrained),
        ("checkpoint.init_from", config.checkpoint.init_from),
    ):
        if path is not None:
            check_exists(key, path, "a directory", want="directory")
    if config.evaluation.interval and config.evaluation.process:
        check_evaluation_paths(config)


def check_evaluation_paths(config: RunConfig) -> None:
    """Refuse sets of questions that do not exist where they are evaluated.

    Raises:
        UserError: A file or directory is missing.
    """
    for number, questions in enumerate(config.evaluation.sets):
        key = f"evaluation.sets.{number}"
        check_exists(f"{key}.records", questions.records, "a file", want="file")
        check_exists(f"{key}.images", questions.images, "a directory", want="directory")
    if config.evaluation.task_data is not None:
        check_exists(
            "evaluation.task_data", config.evaluation.task_data, "a directory", want="directory"
        )


def _check_stage(config: RunConfig) -> None:
    stage = config.stage
    if stage.template not in template_names():
        raise UserError(f"stage.template is {stage.template!r}: use {listed(template_names())}.")
    if not stage.learning_rates:
        raise UserError(
            "stage.learning_rates is empty, so nothing would train: give a rate for at least one "
            "of vision, connector, language and moe."
        )
    if "moe" in stage.learning_rates and not config.has_experts:
        raise UserError(
            f"stage.learning_rates.moe is {stage.learning_rates['moe']} but the model has no "
            f"experts (stage.moe is {str(stage.moe).lower()}, moe.variant is "
            f"{config.moe.variant}): set stage.learning_rates.moe to null, or set stage.moe to "
            "true with moe.variant vanilla, modality or moiie."
        )


def _check_train(config: RunConfig) -> None:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        raise UserError(
            f"train.steps is {_null(train.steps)} and train.epochs is {_null(train.epochs)}: "
            "give exactly one of the two."
        )
    if train.global_batch_size % train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size is {train.global_batch_size} but train.micro_batch_size is "
            f"{train.micro_batch_size}: use a multiple of {train.micro_batch_size}."
        )
    traced = config.profile.steps
    if traced is not None and traced[0] > traced[1]:
        raise UserError(
            f"profile.steps is {traced}: give the first step to trace and then the last."
        )


def _check_evaluation(config: RunConfig) -> None:
    evaluation, saved = config.evaluation, config.checkpoint.interval
    names = [questions.name for questions in evaluation.sets] + evaluation.tasks
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"evaluation has a set or task named {name!r}: use letters, digits, - and _."
            )
        if names.count(name) > 1:
            raise UserError(f"evaluation has two sets or tasks named {name!r}: rename one.")
    if evaluation.interval and not names:
        raise UserError(
            f"evaluation.interval is {evaluation.interval} but there is nothing to evaluate: add "
            "evaluation.sets or evaluation.tasks, or set it to 0."
        )
    if evaluation.interval % saved:
        raise UserError(
            f"evaluation.interval is {evaluation.interval} but a checkpoint is saved every "
            f"{saved} steps (checkpoint.interval): use a multiple of {saved}."
        )


def _null(value: object) -> object:
    return "null" if value is None else value
