"""What the stand-ins share: the folder of one page's run, notes of calls, processes of a launch.

``STANDINS`` names the folder: ``calls`` (JSON lines), ``settings.json``, what the stand-ins keep.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FOLDER = Path(os.environ["STANDINS"])
SETTINGS: dict[str, Any] = json.loads((FOLDER / "settings.json").read_text())
MOST_NODES = 2  # that a launch really has here


def note(program: str, **details: Any) -> None:
    """Add a line to ``calls``."""
    with (FOLDER / "calls").open("a") as file:
        file.write(json.dumps({"program": program, **details}) + "\n")


def new_launch(kind: str, nodes: str) -> str:
    """The name of a launch: ``docker:1``, the second one ``docker:1:2``."""
    name = f"{kind}:{nodes}"
    note("launch", name=name)
    lines = map(json.loads, (FOLDER / "calls").read_text().splitlines())
    count = sum(line["program"] == "launch" and line["name"] == name for line in lines)
    return name if count == 1 else f"{name}:{count}"


def refuse(reason: str) -> None:
    """Ends the stand-in, and so the page's run."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {reason}")


def start(
    words: Sequence[str], launch: str, variables: Mapping[str, str], output: IO[str] | None = None
) -> subprocess.Popen[Any]:
    """A process of a launch in the repository, with nothing of the caller's environment but what
    the tests themselves need."""
    kept = {k: v for k, v in os.environ.items() if k in SETTINGS["kept"]}
    return subprocess.Popen(
        words,
        cwd=SETTINGS["root"],
        env={**kept, **variables, "LAUNCH": launch, "PYTHON": "python"},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_env_file(path: str) -> dict[str, str]:
    """The variables of a file for ``--env-file`` and ``--from-env-file``."""
    lines = Path(path).read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}
