"""Runs that the tests of this folder look at.

Starting processes is what costs here, so every launch trains several tiny runs in turn and every
test reads what it needs from their logs and checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.joint_runs import (
    BLOCK,
    FAMILIES,
    FIRST_SMALL,
    LAST_SMALL,
    LONGROPE,
    ONE_LAYER,
    OVERLAP,
    SAVE_EVERY,
    STEPS,
    VIRTUAL,
    family_values,
    go_back,
    held_out,
    joint_values,
    make_family,
    train_in_turn,
)
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import make_digits, tiny_values


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(session_folder(tmp_path_factory) / "digits", make_digits)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """One process: ``seed`` is a dense checkpoint, the others start from it."""

    def make(folder: Path) -> None:
        seed = folder / "seed"
        dense = tiny_values(digits, seed, "dense")
        dense["train"]["steps"] = 2
        again = tiny_values(digits, folder / "dense", "dense")
        again["train"]["steps"] = 1
        again["checkpoint"]["init_from"] = str(seed)

        def joint(name: str, **sections: Any) -> Any:
            return joint_values(digits, folder / name, seed, **sections)

        one = {"steps": 1}
        short = {**LONGROPE, "long_factor": LONGROPE["short_factor"]}
        eight = {"num_vision_experts": 2, "num_shared_experts": 4, "num_text_experts": 2}
        runs = {
            "seed": dense,
            "dense": again,
            "moiie": joint("moiie", data=held_out(digits)),
            "vanilla": joint("vanilla", moe={"variant": "vanilla"}, train=one),
            "modality": joint("modality", moe={"variant": "modality"}, train=one),
            "moiie8": joint("moiie8", moe=eight, train=one),
            "one_layer": joint("one_layer", moe=ONE_LAYER),
            "longrope": joint("longrope", language={"longrope": LONGROPE}, train=one),
            "shortrope": joint("shortrope", language={"longrope": short}, train=one),
            "bf16": joint("bf16", train={"precision": "bf16", "steps": 3}),
            "fp32": joint("fp32", train={"steps": 3}),
        }
        for family in FAMILIES:
            make_family(folder, family)
            checkpoint = folder / f"{family}-checkpoint"
            runs[family] = family_values(digits, folder / family, checkpoint)
        train_in_turn(folder, runs, processes=1, timeout=400)

    return made_once(session_folder(tmp_path_factory) / "single", make)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, digits: Path, single: Path) -> Path:
    """Two processes in several layouts, and stage 1 on a pipeline."""

    def make(folder: Path) -> None:
        seed = single / "seed"

        def joint(name: str, degrees: dict[str, Any], **sections: Any) -> Any:
            return joint_values(digits, folder / name, seed, parallel=degrees, **sections)

        connector = tiny_values(digits, folder / "connector", "connector")
        connector["train"]["steps"] = 2
        connector["checkpoint"]["init_from"] = str(seed)
        connector["checkpoint"]["interval"] = 1
        connector["parallel"] = {"pipeline": 2}
        dense = tiny_values(digits, folder / "dense", "dense")
        dense["train"]["steps"] = 1
        dense["checkpoint"]["init_from"] = str(seed)
        dense["parallel"] = VIRTUAL
        connector["ddp"] = OVERLAP
        longrope = {"language": {"longrope": LONGROPE}, "train": {"steps": 1}}
        runs = {
            # Also the undisturbed run that test_resume.py compares with.
            "ep2": joint("ep2", {"expert": 2}, checkpoint={"interval": SAVE_EVERY}),
            "pp2": joint("pp2", {"pipeline": 2}),
            "pp2block": joint("pp2block", {"pipeline": 2}, megatron=BLOCK),
            "pp2first": joint("pp2first", {"pipeline": 2, "pipeline_layers": FIRST_SMALL}),
            "pp2last": joint("pp2last", {"pipeline": 2, "pipeline_layers": LAST_SMALL}),
            # Also the undisturbed run of a resumed one.
            "pp2virtual": joint(
                "pp2virtual", VIRTUAL, checkpoint={"interval": SAVE_EVERY}, data=held_out(digits)
            ),
            "tp2": joint("tp2", {"tensor": 2}, data=held_out(digits)),
            "dp2": joint("dp2", {}, data=held_out(digits)),
            "tp2etp2": joint("tp2etp2", {"tensor": 2, "expert_tensor": 2}),
            "tp2ep2": joint("tp2ep2", {"tensor": 2, "expert": 2}),
            "one_layer": joint(
                "one_layer",
                VIRTUAL,
                moe=ONE_LAYER,
                checkpoint={"interval": SAVE_EVERY},
            ),
            "tp2longrope": joint("tp2longrope", {"tensor": 2}, **longrope),
            "pp2longrope": joint("pp2longrope", {"pipeline": 2}, **longrope),
            "connector": connector,
            "dense": dense,
        }
        for family in FAMILIES:
            for layout, degrees in (("ep2", {"expert": 2}), ("tp2", {"tensor": 2})):
                name, checkpoint = f"{family}-{layout}", single / f"{family}-checkpoint"
                runs[name] = family_values(digits, folder / name, checkpoint, parallel=degrees)
        train_in_turn(folder, runs, processes=2, timeout=500)

    return made_once(session_folder(tmp_path_factory) / "pair", make)


@pytest.fixture(scope="session")
def quad(tmp_path_factory: pytest.TempPathFactory, digits: Path, single: Path, pair: Path) -> Path:
    """Four processes: two kinds of parallelism at once, and the end of a run of the pair."""

    def make(folder: Path) -> None:
        seed = single / "seed"
        resumed = go_back(pair / "ep2", folder / "resumed", STEPS - SAVE_EVERY)
        one_layer = go_back(pair / "one_layer", folder / "one_layer", STEPS - SAVE_EVERY)
        both = {"pipeline": 2, "expert": 2}
        connector = tiny_values(
            digits, go_back(pair / "connector", folder / "connector", 1), "connector"
        )
        connector["train"]["steps"] = 2
        connector["parallel"] = VIRTUAL
        runs = {
            "tp2ep2dp2": joint_values(
                digits,
                folder / "tp2ep2dp2",
                seed,
                parallel={"tensor": 2, "expert": 2},
                data=held_out(digits),
            ),
            "resumed": joint_values(digits, resumed, seed, parallel={**both, **VIRTUAL}),
            "one_layer": joint_values(digits, one_layer, seed, parallel=both, moe=ONE_LAYER),
            "connector": connector,
        }
        train_in_turn(folder, runs, processes=4, timeout=500)

    return made_once(session_folder(tmp_path_factory) / "quad", make)
