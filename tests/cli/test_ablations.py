"""Baselines and ablations: what each of them changes, and that each of them trains."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.config.validate import check_config
from moiie_megatron.planning.parameters import count_parameters
from tests.helpers.launch import ROOT, TRAIN, Finished, command, environment, python, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_metrics
from tests.helpers.user_errors import assert_user_error

EXAMPLES = ROOT / "examples"
ABLATIONS = EXAMPLES / "ablations"
BACKBONES = ("llama3", "phi3")
PATHS = ("LLM", "VISION", "STAGE1_RECORDS", "STAGE1_IMAGES", "STAGE2_RECORDS", "STAGE2_IMAGES")
ENVIRON = {name: f"/{name.lower()}" for name in (*PATHS, "OUTPUT")}

CLIP = {
    "vision.activation": "quick_gelu",
    "vision.family": "clip",
    "vision.ffn_hidden_size": 4096,
    "vision.hidden_size": 1024,
    "vision.image_size": 336,
    "vision.norm_epsilon": 1e-5,
    "vision.num_layers": 24,
}
# What differs from the backbone's stage 2 (stage 1 where the name says so), besides the output and
# what is the same there.
CHANGES: dict[str, dict[str, Any]] = {
    "alpha-0.01": {"moe.text_aux_loss_coeff": 0.01, "moe.vision_aux_loss_coeff": 0.01},
    "clip": {**CLIP, "checkpoint.init_from": "/output/clip-stage1"},
    "clip-stage1": CLIP,
    "dense": {
        "moe.variant": "dense",
        "stage.learning_rates.moe": None,
        "stage.moe": False,
        "stage.name": "dense",
        "megatron.recompute_granularity": None,
        "megatron.recompute_modules": None,
    },
    "full": {
        "moe.layers": "all",
        "megatron.recompute_granularity": "selective",
        "megatron.recompute_modules": ["moe"],
    },
    "modality": {"moe.variant": "modality"},
    "moiie-8": {
        "moe.num_vision_experts": 2,
        "moe.num_shared_experts": 4,
        "moe.num_text_experts": 2,
    },
    "moiie-8-unbalanced": {
        "moe.num_vision_experts": 3,
        "moe.num_shared_experts": 2,
        "moe.num_text_experts": 3,
    },
    "three-stage": {
        "checkpoint.init_from": "/output/dense",
        "stage.learning_rates.connector": None,
        "stage.learning_rates.language": None,
        "stage.learning_rates.vision": None,
        "stage.name": "moe-only",
    },
    "vanilla": {"moe.variant": "vanilla"},
}
# Billions of parameters on Phi-3-mini: activated, total.
PHI3_SIZES = {
    "alpha-0.01": (5.46, 7.87),
    "clip": (5.35, 7.76),
    "clip-stage1": (4.14, 4.14),
    "dense": (4.25, 4.25),
    "full": (6.66, 11.50),
    "modality": (5.46, 7.87),
    "moiie-8": (5.46, 12.70),
    "moiie-8-unbalanced": (5.46, 12.70),
    "three-stage": (5.46, 7.87),
    "vanilla": (5.46, 7.87),
}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _load(file: Path, backbone: str) -> Any:
    return load_config(file, environ={**ENVIRON, "BACKBONE": backbone})


def test_every_file_is_listed() -> None:
    names = sorted(file.stem for file in ABLATIONS.glob("*.yaml"))
    assert names == sorted(CHANGES) == sorted(PHI3_SIZES)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_this_and_nothing_else(name: str, backbone: str) -> None:
    stage = "stage1" if name.endswith("stage1") else "stage2"
    base = dict(
        _flat(_load(EXAMPLES / "configs" / f"{backbone}-{stage}.yaml", backbone).model_dump())
    )

    config = _load(ABLATIONS / f"{name}.yaml", backbone)

    values = dict(_flat(config.model_dump()))
    changed = {key: values.get(key) for key in base | values if base.get(key) != values.get(key)}
    wanted = {**CHANGES[name], "output": f"/output/{name}"}
    assert changed == {key: value for key, value in wanted.items() if base.get(key) != value}
    for world_size in (8, 16, 32):
        check_config(config, world_size=world_size)


@pytest.mark.parametrize("name", PHI3_SIZES)
def test_sizes(name: str) -> None:
    count = count_parameters(_load(ABLATIONS / f"{name}.yaml", "phi3"))
    assert (round(count.activated / 1e9, 2), round(count.total / 1e9, 2)) == PHI3_SIZES[name]


def _bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments],
        env={**environment(), "PYTHON": python(), **variables},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("vanilla", ["configs/phi3-stage1"]),
        ("dense", ["configs/phi3-stage1"]),
        ("three-stage", ["configs/phi3-stage1", "ablations/dense"]),
        ("clip", ["ablations/clip-stage1"]),
        ("clip-stage1", []),
    ],
)
def test_one_command_trains_every_stage(name: str, before: list[str], tmp_path: Path) -> None:
    """What a process that torchrun has started hands to tools/train.py."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$BACKBONE $OUTPUT"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    result = _bash(
        *("train_ablation.sh", "phi3", name, "train.seed=7"),
        **{**ENVIRON, "PYTHON": str(python), "LOCAL_RANK": "0", "EP": "4"},
    )

    words = [f"{ROOT}/tools/train.py"]
    for file in (*before, f"ablations/{name}"):
        words += [f"{EXAMPLES}/{file}.yaml", "parallel.expert=4", "train.seed=7"]
    assert result.stdout.splitlines() == ["phi3 /output", *words]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["phi4", "vanilla"], ("first argument", "'phi4'", "llama3 or phi3")),
        (["phi3", "moie"], ("second argument", "'moie'", "alpha-0.01")),
        ([], ("first argument", "''", "llama3 or phi3")),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], parts: tuple[str, ...]) -> None:
    result = _bash("train_ablation.sh", *arguments)
    assert_user_error(Finished(result.returncode, result.stdout, result.stderr), *parts)
    assert result.stdout == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of every run that train_ablation.sh starts without paths."""
    return made_once(session_folder(tmp_path_factory) / "ablations", _train_all)


def _train_all(output: Path) -> None:
    """All in one process: starting one is what costs."""
    stand_in = output / "python"
    # Writes the data, and notes the words for tools/train.py.
    stand_in.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {python()} "$@"; fi\n'
        'printf "%s\\n" "$@" > "$WORDS"\n'
    )
    stand_in.chmod(0o755)
    runs: dict[str, list[str]] = {}
    file = ""
    for name in ("three-stage", "clip", *CHANGES):
        words = output / f"{name}.words"
        _bash(
            *("train_ablation.sh", "phi3", name, "train.steps=2"),
            **{"PYTHON": str(stand_in), "WORDS": str(words), "OUTPUT": str(output)},
            LOCAL_RANK="0",
        ).check_returncode()
        for word in words.read_text().splitlines()[1:]:
            if "=" in word:
                runs[file].append(word)
            else:
                file = word if word not in runs else f"{word} again"
                runs[file] = [word]
    runs = {file: words for file, words in runs.items() if not file.endswith("again")}
    data = output / "data"
    variables = {"LLM": data, "VISION": data, "OUTPUT": output}
    for stage, records in (("1", "captions.json"), ("2", "train.jsonl")):
        variables |= {
            f"STAGE{stage}_RECORDS": data / records,
            f"STAGE{stage}_IMAGES": data / "images",
        }
    finished = subprocess.run(
        [python(), "tools/train.py", *(word for words in runs.values() for word in words)],
        env={
            **environment(),
            "BACKBONE": "phi3",
            **{name: str(path) for name, path in variables.items()},
        },
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["stage1", *CHANGES])
def test_trains(name: str, trained: Path) -> None:
    steps = read_metrics(trained / name)

    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["lm_loss"] < 20 for step in steps)
    config = load_config(trained / name / "config.yaml", environ={})
    assert sorted(key[3:] for key in steps[0] if key.startswith("lr_")) == sorted(
        config.stage.learning_rates
    )
    assert {key[4:] for key in steps[0] if key.startswith("aux_")} == (
        set(config.moe.layout.routers) if config.moe_layers else set()
    )


@pytest.mark.slow
def test_all_start_alike(trained: Path) -> None:
    """Same weights, same samples: before the first update only experts' routing differs, and
    experts are copies, so the losses agree."""
    same_start = sorted(CHANGES.keys() - {"clip", "clip-stage1", "three-stage"})
    losses = {name: read_metrics(trained / name)[0]["lm_loss"] for name in same_start}
    assert losses == pytest.approx(dict.fromkeys(same_start, losses["dense"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_three_stages_with_one_command(tmp_path: Path) -> None:
    """The script from its start, on two processes."""
    arguments = ("train_ablation.sh", "llama3", "three-stage", "train.steps=1")

    result = _bash(*arguments, OUTPUT=str(tmp_path))

    assert result.returncode == 0, result.stderr[-3000:]
    runs = ("stage1", "dense", "three-stage")
    assert [len(read_metrics(tmp_path / name)) for name in runs] == [1, 1, 1]
    sources = [
        load_config(tmp_path / name / "config.yaml", environ={}).checkpoint.init_from
        for name in runs
    ]
    assert sources == [None, str(tmp_path / "stage1"), str(tmp_path / "dense")]


@pytest.mark.slow
def test_is_done(trained: Path) -> None:
    """Exit codes for scripts that start a run again until it has come to its end."""
    configs = [str(trained / name / "config.yaml") for name in ("dense", "vanilla")]

    done = run(command(TRAIN, [*configs, "--is-done"]), timeout=60)
    unfinished = run(command(TRAIN, [configs[0], "--is-done", configs[1], "train.steps=3"]), 60)
    by_epochs = ["train.steps=null", "train.epochs=1"]
    not_begun = run(
        command(TRAIN, [configs[0], *by_epochs, f"output={trained / 'none'}", "--is-done"]), 60
    )

    assert done.code == 0, done.stderr
    assert done.stdout == "".join(f"{trained / n}: step 2 of 2\n" for n in ("dense", "vanilla"))
    assert unfinished.code == 3, unfinished.stderr
    assert unfinished.stdout.endswith("/vanilla: step 2 of 3\n")
    assert not_begun.code == 3, not_begun.stderr
    records = len((trained / "data/train.jsonl").read_text().splitlines())
    assert not_begun.stdout == f"{trained / 'none'}: step 0 of {-(-records // 4)}\n"
