"""Reads checkpoints of format version 1, which describe their run in English sentences.

Numbers in the sentences have six significant digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moiie_megatron.utils.errors import UserError

_SOURCE = re.compile(r"(\d+) of (\d+)")
_ENERGON = re.compile(r" by energon on (\d+) data-parallel ranks x (\d+) workers$")
_SCHEDULE = re.compile(
    r"(\d+) steps .*?learning rates (.*), warmup_ratio (\S+), min_lr_ratio (\S+), "
    r"weight_decay (\S+)"
)
_EXPERTS = re.compile(
    r"(\w+) with (\d+) vision, (\d+) shared and (\d+) text experts in layers (\[.*\])"
)


def identity_from_sentences(progress: Mapping[str, Any]) -> dict[str, Any]:
    """What a version 1 checkpoint says about its run, as ``training/identity.py`` writes it.

    Args:
        progress: ``num_samples`` and ``seed``; ``blend``, ``schedule`` and ``experts`` may be
            missing or empty (the first programs did not write them).

    Raises:
        UserError: A sentence is not of the known form.
    """
    identity: dict[str, Any] = {
        "seed": progress["seed"],
        "epoch_size": progress["num_samples"],
    }
    if text := progress.get("blend"):
        identity |= _order(text)
    if text := progress.get("schedule"):
        steps, rates, *ratios = _match(_SCHEDULE, text)
        names = ("warmup_ratio", "min_lr_ratio", "weight_decay")
        identity["schedule"] = {
            "steps": int(steps),
            "learning_rates": {
                part: float(rate) for part, rate in (pair.split(" ") for pair in rates.split(", "))
            },
            **{name: float(value) for name, value in zip(names, ratios, strict=True)},
        }
    if text := progress.get("experts"):
        identity["experts"] = _experts(text)
    return identity


def renamed_counters(counters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``counters`` of a checkpoint of any version under today's names."""
    if "watch" not in counters:
        return counters
    state = dict(counters["watch"])
    state["skipped_in_a_row"] = state.pop("bad_in_a_row")
    return {**counters, "anomalies": state}


def _order(text: str) -> dict[str, Any]:
    energon = _ENERGON.search(text)
    sources = text[: energon.start()] if energon else text
    return {
        "sources": [
            {"size": int(size), "samples_per_epoch": int(count)}
            for count, size in (_match(_SOURCE, source) for source in sources.split(", "))
        ],
        "loader": (
            {"name": "energon", "dp_ranks": int(energon[1]), "workers": int(energon[2])}
            if energon
            else {"name": "plain"}
        ),
    }


def _experts(text: str) -> dict[str, Any]:
    if text == "no experts":
        return {"variant": "dense"}
    variant, vision, shared, in_text, layers = _match(_EXPERTS, text)
    numbers = {"vision": int(vision), "shared": int(shared), "text": int(in_text)}
    return {"variant": variant, **numbers, "layers": json.loads(layers)}


def _match(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    found = pattern.fullmatch(text)
    if found is None:
        raise UserError(
            f"The checkpoint describes its run as {text!r}, which this program cannot read: go on "
            "with the program that saved it, or start a new run from its weights "
            "(checkpoint.init_from)."
        )
    return found.groups()
