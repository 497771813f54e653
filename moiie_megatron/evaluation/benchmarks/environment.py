"""The Python of lmms-eval's environment, and the variables that its tasks read."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moiie_megatron.evaluation.benchmarks.catalogue import LMMS_EVAL, Benchmark
from moiie_megatron.utils.errors import UserError

ROOT: Final = Path(__file__).resolve().parents[3]
DEFAULT_PYTHON: Final = ROOT / ".venv" / f"lmms-eval-{LMMS_EVAL}" / "bin" / "python"
PYTHON_VARIABLE: Final = "MOIIE_EVAL_PYTHON"
_CHECK_SECONDS: Final = 300  # importing torch from a slow disk

# Neither lmms_eval/__init__.py nor anything else heavy is run, but for torchvision if it is there:
# lmms-eval installs one that may not fit torch, and then no command of lmms-eval works.
_CHECK = """
import importlib.util, json, pathlib, re
from importlib import metadata
found = {"version": None, "tasks": [], "problem": ""}
spec = importlib.util.find_spec("lmms_eval")
if spec is not None:
    found["version"] = metadata.version("lmms-eval")
    root = pathlib.Path(spec.submodule_search_locations[0], "tasks")
    texts = (file.read_text(errors="replace") for file in root.rglob("*.yaml"))
    names = (re.search(r"^task: *[\\"']?([\\w.-]+)", text, re.M) for text in texts)
    found["tasks"] = sorted({name[1] for name in names if name})
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision
        except Exception as error:
            found["problem"] = f"torchvision: {error}"
    models = metadata.entry_points(group="lmms_eval.models")
    if "moiie" not in models.names:
        found["problem"] = "moiie-megatron is not installed beside it"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class EvalEnvironment:
    """An environment with lmms-eval.

    Attributes:
        python: Its interpreter.
        version: Of lmms-eval.
        tasks: Names of lmms-eval's tasks.
    """

    python: Path
    version: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class JudgeServer:
    """A language model that judges answers, behind an OpenAI-compatible server.

    Attributes:
        url: ``http://HOST:PORT/v1``.
        model: The name that the server gives it; None leaves the task's own.
        key: For the server.
    """

    url: str
    model: str | None
    key: str


def find_environment(python: str | None, variables: Mapping[str, str]) -> EvalEnvironment:
    """The environment at ``python``, ``$MOIIE_EVAL_PYTHON`` or where ``make eval-env`` puts it.

    Raises:
        UserError: It does not exist, or lmms-eval does not run in it.
    """
    path = Path(python or variables.get(PYTHON_VARIABLE) or DEFAULT_PYTHON).expanduser()
    advice = "run make eval-env, or name the Python of an environment with lmms-eval by --python"
    if not os.access(path, os.X_OK):
        raise UserError(f"There is no Python with lmms-eval at {path}: {advice}.")
    try:
        result = subprocess.run(
            [path, "-c", _CHECK], capture_output=True, text=True, timeout=_CHECK_SECONDS
        )
        found = json.loads(result.stdout.splitlines()[-1])
        version, tasks, problem = found["version"], found["tasks"], found["problem"]
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not the Python of such an environment: {advice}.") from error
    if version is None:
        raise UserError(f"{path} has no lmms-eval: {advice}.")
    if problem:
        raise UserError(
            f"lmms-eval of {path} cannot be used ({problem}): run make eval-env, whose recipe "
            "mends this, or name another environment by --python."
        )
    return EvalEnvironment(path.absolute(), version, tuple(tasks))


def task_variables(
    benchmark: Benchmark, judge: JudgeServer | None, variables: Mapping[str, str]
) -> dict[str, str]:
    """What the process of one task finds in its environment.

    Args:
        judge: For a task that needs one.
        variables: Of this process.
    """
    result = {**variables, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if (ROOT / "pyproject.toml").is_file():  # a checkout: the process runs the same code
        result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), result.get("PYTHONPATH")]))
    if benchmark.judge is not None and judge is None:
        result.setdefault("OPENAI_API_KEY", "none")  # its client wants one before it is used
    elif benchmark.judge is not None and judge is not None:
        result["API_TYPE"] = "openai"
        result["OPENAI_API_URL"] = judge.url.rstrip("/") + benchmark.judge.url_suffix
        result["OPENAI_API_KEY"] = judge.key
        if judge.model is not None:
            result["MODEL_VERSION"] = judge.model
    return result
