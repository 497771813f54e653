"""The pages that lead from one node to many: their commands run, in order, with a tiny model.

What cannot run here (Docker, Slurm, Kubernetes, the hub, GPUs) has stand-ins, which check their
arguments and run what they are given on this machine (``standins/``).  Some launches train; of the
others the command line of torchrun is compared.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from moiie_megatron.config.load import load_config
from moiie_megatron.config.validate import check_config
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.planning.parameters import count_parameters
from tests.docs.doc_pages import ROOT, blocks
from tests.helpers.launch import environment, python
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_metrics
from tests.helpers.user_errors import user_error

STANDINS = Path(__file__).parent / "standins"
PROGRAMS = {
    "python": "interpreter.py",
    "docker": "docker.py",
    "kubectl": "kubectl.py",
    "hf": "hub.py",
    **dict.fromkeys(("sbatch", "srun", "scontrol"), "slurm.py"),
}
PATHS = re.compile(r"(?<![\w/.\-])/(models|data|runs)\b")
PLAN = re.compile(r"<!-- plan: (.*?) -->\n(.*?)<!-- end of plan -->", re.DOTALL)
# Commands of the planner that run, without the name of the program; it has tests of its own.
PLANS = ["examples/configs/llama3-stage2.yaml --gpus 8 --summary"]
STEPS = 2
OVERRIDES = [
    *("vision.preset=tiny-siglip", "data.sequence_length=256", "data.num_workers=0"),
    *(f"train.steps={STEPS}", "train.epochs=null", "train.precision=fp32", "train.device=cpu"),
    *("train.micro_batch_size=2", "train.global_batch_size=4", "parallel.tensor=1"),
]
# Stops after its first step of stage 2, which another launch goes on with.
STOPS_EARLY = ["parallel.expert=1", "train.exit_after_minutes=1.0e-6"]


@dataclass(frozen=True)
class Case:
    """A page, and what is tiny about it.

    Attributes:
        real: Launches that train, by kind and number of nodes on the page.
        stage2: Further overrides of stage 2, by launch.
    """

    backbone: str
    page: Path
    llm: str
    preset: str
    real: tuple[str, ...]
    stage2: dict[str, list[str]]


CASES = [
    Case(
        backbone="llama3",
        page=ROOT / "docs/train-llama3-8b.md",
        llm="meta-llama/Meta-Llama-3-8B-Instruct",
        preset="tiny-llama",
        real=("host", "docker:1", "kubernetes:8"),
        stage2={
            "docker:1": STOPS_EARLY,
            "kubernetes:8": ["parallel.expert=2"],
            "host": ["parallel.expert=1"],
        },
    ),
    Case(
        backbone="phi3",
        page=ROOT / "docs/train-phi3.md",
        llm="microsoft/Phi-3-mini-4k-instruct",
        preset="tiny-phi3",
        real=("host", "slurm:1", "slurm:1:2"),
        stage2={"slurm:1:2": ["parallel.expert=1"]},
    ),
]
VARIABLES = ("LLM", "VISION", "STAGE1_RECORDS", "STAGE1_IMAGES", "STAGE2_RECORDS", "STAGE2_IMAGES")
VARIABLES += ("OUTPUT",)
VISION = "google/siglip-so400m-patch14-384"
DATA = "BoyaWu10/Bunny-v1_0-data"
LAUNCHES = [f"{kind}:{nodes}" for kind in ("docker", "slurm", "kubernetes") for nodes in (1, 8)]


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(session_folder(tmp_path_factory) / "hub", _make_hub)


def _make_hub(folder: Path) -> None:
    """Repositories of the hub, their files tiny."""
    digits = write_digits(folder / "digits", train=60, test=4)
    for case in CASES:
        config = load_config(
            ROOT / f"examples/configs/{case.backbone}-stage1.yaml",
            [f"language.preset={case.preset}", *OVERRIDES],
            environ=dict.fromkeys(VARIABLES, "/none"),
        )
        torch.manual_seed(5)
        language = language_to_hf(config.language)
        language.pad_token_id, language.eos_token_id = 0, 2  # Phi-3's own are beyond 512
        llm = AutoModelForCausalLM.from_config(language)
        llm.save_pretrained(folder / case.llm)
        shutil.copy(digits / "tokenizer.model", folder / case.llm)
    AutoModel.from_config(vision_to_hf(config.vision)).save_pretrained(folder / VISION)
    for name, records in (
        ("pretrain/bunny_pretrain_laion_2m", "captions.json"),
        ("finetune/bunny_695k", "train.jsonl"),
    ):
        file = folder / DATA / f"{name}.json"
        file.parent.mkdir(parents=True)
        text = (digits / records).read_text()
        if records.endswith("l"):
            text = json.dumps([json.loads(line) for line in text.splitlines()])
        file.write_text(text)
        archive = file.parent / "images.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(digits / "images", "images")
        content = archive.read_bytes()
        archive.unlink()
        half = len(content) // 2
        for number, part in enumerate((content[:half], content[half:])):
            archive.with_name(f"images.tar.gz.part-0{number}").write_bytes(part)


@pytest.fixture(params=CASES, ids=lambda case: case.backbone)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_plans_are_marked(case: Case) -> None:
    """Every command of the planner has its output behind it, between two marks."""
    text = case.page.read_text()
    marked = [found[1] for found in PLAN.finditer(text)]
    assert len(marked) == text.count("<!-- plan:") == text.count("<!-- end of plan -->")
    commands = re.findall(r"^python tools/plan\.py (.*)$", text, re.MULTILINE)
    assert marked == [command for command in commands if "--data" not in command]
    assert {command.partition("--gpus ")[2] for command in marked} == {
        "8 --summary",
        "64 --summary",
    }
    for found in PLAN.finditer(text):
        file, *_ = found[1].split()
        assert (ROOT / file).is_file()
        # In a block, whose headings are not those of the page; tests/full_size compares it.
        assert re.fullmatch(r"\n```text\n# \d+ x H100: [^`]+```\n\n", found[2])


class Page:
    """A page whose commands have run, in one shell, and what was called."""

    def __init__(self, case: Case, folder: Path, hub: Path) -> None:
        self.case, self.storage, self._folder = case, folder / "storage", folder / "standins"
        for name in ("models", "data", "runs"):
            (self.storage / name).mkdir(parents=True)
        programs = self._folder / "bin"
        programs.mkdir(parents=True)
        for name, script in PROGRAMS.items():
            # -S: without the packages of the environment a stand-in starts at once.
            options = "" if name == "kubectl" else "-S"
            self._program(name, f'exec {sys.executable} {options} {STANDINS / script} "$@"')
        self._program("enroot", '[ "$1" = import ]')
        self._program("nvidia-smi", '[ "$1" != -L ]')  # finds no GPU
        self._program("torchrun", 'exec python -m torch.distributed.run "$@"')
        # What a user changes in a copy of the file of paths.
        self._program("edit", f"sed -i -E 's#=/(models|data|runs)/#={self.storage}/\\1/#' \"$@\"")
        settings = {
            "root": str(ROOT),
            "storage": str(self.storage),
            "hub": str(hub),
            "python": python(),
            "overrides": [f"language.preset={case.preset}", *OVERRIDES],
            "real": case.real,
            "stage2": case.stage2,
            "plans": PLANS,
            "kept": ["STANDINS", *sorted(environment().keys() - {*VARIABLES, "BACKBONE"})],
        }
        (self._folder / "settings.json").write_text(json.dumps(settings))

    def _program(self, name: str, line: str) -> None:
        program = self._folder / "bin" / name
        program.write_text(f"#!/bin/sh\nexport STANDIN_NAME={name}\n{line}\n")
        program.chmod(0o755)

    def run(self) -> subprocess.CompletedProcess[str]:
        """Run all bash blocks, one after the other."""
        script = "set -euo pipefail\n" + "\n".join(blocks(self.case.page, "bash"))
        script = PATHS.sub(rf"{self.storage}/\1", script)
        unset = {*VARIABLES, "BACKBONE", "NODES", "CONFIG", "CONTAINER", "PYTHON"}
        kept = {name: value for name, value in environment().items() if name not in unset}
        variables = {
            "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
            "STANDINS": str(self._folder),
            "EDITOR": "edit",
        }
        return subprocess.run(
            ["bash", "-x", "-c", script],
            env=kept | variables,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=550,
        )

    def calls(self, *programs: str) -> list[dict[str, Any]]:
        lines = (self._folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call["program"] in programs]

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return read_metrics(self.storage / "runs" / f"moiie-{self.case.backbone}" / run)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_commands_of_a_page(case: Case, hub: Path, tmp_path: Path) -> None:
    page = Page(case, tmp_path, hub)

    finished = page.run()

    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-6000:]}"
    assert {call["repository"] for call in page.calls("hf")} == {case.llm, VISION, DATA}
    words = [call["words"] for call in page.calls("python")]
    planned = [" ".join(call[1:]) for call in words if call[0] == "tools/plan.py"]
    marked = [found[1] for found in PLAN.finditer(case.page.read_text())]
    assert planned[: len(marked)] == marked
    _check_launches(page)
    _check_training(page)
    export = page.storage / f"runs/moiie-{case.backbone}-hf"
    assert json.loads((export / "config.json").read_text())["moe_layers"] == [1, 3]
    assert (page.storage / f"runs/{case.backbone}.html").is_file()


def _check_launches(page: Page) -> None:
    """What torchrun is told, on every number of nodes and by every launcher."""
    case = page.case
    seen = set()
    for call in page.calls("python"):
        words, launch = " ".join(call["words"]), call["variables"].get("LAUNCH")
        if launch in (None, "selftest") or "torch.distributed.run" not in words:
            continue
        seen.add(launch)
        kind, nodes, *_ = launch.split(":")
        if launch in case.real:
            nodes = str(min(int(nodes), 2))  # standins/common.py
        assert "--nproc-per-node 8 " in words
        assert ("--standalone" if nodes == "1" else f"--nnodes {nodes} --rdzv-endpoint ") in words
        assert nodes == "1" or "--rdzv-backend c10d" in words
        script = f"examples/pretrain_moiie_{case.backbone}.sh"
        stages = [f"examples/configs/{case.backbone}-stage{number}.yaml" for number in (1, 2)]
        if kind == "kubernetes":
            assert words.endswith(f"tools/train.py {' '.join(stages)}")
        elif kind == "slurm":
            assert any(f"tools/train.py {stage}" in words for stage in stages)
        else:
            assert script in words or f"tools/train.py {' '.join(stages)}" in words
    assert seen >= {*LAUNCHES, "slurm:4", "kubernetes:4"}

    jobs = [call for call in page.calls("job") if call["launch"].startswith("slurm")]
    assert {job["code"] for job in jobs} == {0}
    requeued = sum(call["words"][0] == "requeue" for call in page.calls("scontrol"))
    # Noted launches do not come to their end.
    assert requeued == len([job for job in jobs if job["launch"] not in case.real]) > 0
    for call in page.calls("pods"):
        assert set(call["codes"]) == ({0} if call["launch"] in case.real else {3})
    images = {job["image"] for job in page.calls("job") if "image" in job}
    assert images == {"registry.example.com/team/moiie"}


def _check_training(page: Page) -> None:
    """Both stages have come to their end, and the page's words about the first loss hold."""
    for stage in ("stage1", "stage2"):
        assert [line["step"] for line in page.metrics(stage)] == list(range(1, STEPS + 1))
    first = page.metrics("stage2")[0]
    assert 2 <= first["aux_vision"] < 3 and 2 <= first["aux_text"] < 3
    if page.case.backbone == "llama3":
        assert first["lm_loss"] == pytest.approx(
            page.metrics("dense-check")[0]["lm_loss"], rel=1e-5
        )
        # Docker began stage 2 with EP=1, two pods have ended it with EP=2.
        config = page.storage / "runs/moiie-llama3/stage2/config.yaml"
        assert load_config(config, environ={}).parallel.expert == 2


def test_numbers_of_a_page(case: Case) -> None:
    """Sizes of the model, and the loss of one that knows nothing."""
    config = load_config(
        ROOT / f"examples/configs/{case.backbone}-stage2.yaml", environ=_variables(case)
    )
    count, vocabulary = count_parameters(config), config.language.vocab_size
    text = " ".join(case.page.read_text().split())
    assert f"{count.total / 1e9:.2f} billion" in text
    assert f"activates {count.activated / 1e9:.2f} billion" in text
    assert f"ln({vocabulary:,}) = {math.log(vocabulary):.2f}" in text


def test_remedies_can_be_set(case: Case) -> None:
    """The overrides for a model that does not fit are ones that a run of 8 GPUs accepts."""
    section = case.page.read_text().split("When it does not fit\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| `([^`|]+=[^`|]+)` \|", section, re.MULTILINE)
    assert len(cells) >= 7
    environ = _variables(case)
    for cell in cells:
        config = load_config(
            ROOT / f"examples/configs/{case.backbone}-stage2.yaml", cell.split(), environ=environ
        )
        check_config(config, world_size=8)


def test_nodes_that_divide_the_samples(case: Case) -> None:
    """The table of numbers of nodes says which are refused."""
    rows = re.findall(r"^\| (\d[\d, ]*) \| (\S+).* \|$", case.page.read_text(), re.MULTILINE)
    rows = {int(nodes): cell for cells, cell in rows for nodes in cells.split(", ")}
    assert {1, 2, 3, 4, 5, 6, 7, 8, 16} <= rows.keys()
    for nodes, cell in rows.items():
        overrides = [cell.strip("`")] if "=" in cell else []
        for stage, more in ((1, overrides), (2, [])):
            file = ROOT / f"examples/configs/{case.backbone}-stage{stage}.yaml"
            config = load_config(file, more, environ=_variables(case))
            if cell == "refused":
                with user_error("use a multiple of"):
                    check_config(config, world_size=8 * nodes)
            else:
                check_config(config, world_size=8 * nodes)


def test_the_file_of_paths_is_complete(case: Case) -> None:
    variables = _variables(case)
    assert list(variables) == ["BACKBONE", *VARIABLES]
    assert variables["LLM"] == f"/models/{case.llm.split('/')[1]}"
    assert variables["VISION"] == f"/models/{VISION.split('/')[1]}"
    assert all(f"/data/{DATA.split('/')[1]}/" in variables[name] for name in VARIABLES[2:6])


def _variables(case: Case) -> dict[str, str]:
    lines = (ROOT / f"examples/{case.backbone}.env").read_text().splitlines()
    return dict(line.split("=") for line in lines if not line.startswith("#"))
