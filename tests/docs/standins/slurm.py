"""In place of ``sbatch``, ``srun`` and ``scontrol``: a job runs here, at once, on this machine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from common import FOLDER, MOST_NODES, SETTINGS, free_port, new_launch, note, start

VALUE = re.compile(r"--(\w[\w-]*)(?:=(.*))?$")


def main() -> int:
    name = os.environ["STANDIN_NAME"]
    words = sys.argv[1:]
    note(name, words=words)
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[name](words)


def options_of(words: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Options in front of a command, and the command."""
    options: dict[str, str | None] = {}
    while found := VALUE.match(words[0]):
        options[found[1]] = found[2]
        words = words[1:]
    return options, words


def sbatch(words: list[str]) -> int:
    options, command = options_of(words)
    text = Path(command[0]).read_text()
    in_file = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    nodes = options.get("nodes") or in_file["nodes"]
    copy = FOLDER / "slurm_script"
    copy.write_text(text)
    number = 20000 + free_port() % 10000  # job.sh makes a port of its last digits
    variables = {
        **{k: v for k, v in os.environ.items() if k not in ("LAUNCH", "PYTHON")},
        "SLURM_SUBMIT_DIR": SETTINGS["root"],
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "gpu[01-99]",
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_GPUS_ON_NODE": in_file["gpus-per-node"],
    }
    launch = new_launch("slurm", nodes)
    if launch in SETTINGS["real"]:
        variables["SLURM_JOB_NUM_NODES"] = str(min(int(nodes), MOST_NODES))
    with (FOLDER / f"job-{number}.log").open("w") as log:
        code = start(["bash", str(copy), *command[1:]], launch, variables, log).wait()
    note("job", code=code, launch=launch)
    print(number)
    return code


def srun(words: list[str]) -> int:
    options, command = options_of(words)
    tasks = min(int(options["nodes"] or 1), MOST_NODES)
    launch = os.environ["LAUNCH"]
    variables = {k: v for k, v in os.environ.items() if k != "LAUNCH"}
    processes = [start(command, launch, variables) for _ in range(tasks)]
    return max(process.wait() for process in processes)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("localhost\ngpu02")
    return 0


if __name__ == "__main__":
    sys.exit(main())
