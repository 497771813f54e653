"""In place of ``docker``: what is run in a container runs here, with the container's variables."""

from __future__ import annotations

import sys
from pathlib import Path

from common import FOLDER, new_launch, note, read_env_file, refuse, start

WITH_VALUE = ("-v", "-e", "--env-file", "--gpus", "--ulimit", "--device", "--cap-add")
ALONE = ("--rm", "--ipc=host", "--network=host", "--cap-add=IPC_LOCK", "--device=/dev/infiniband")
IMAGES = FOLDER / "images"


def main() -> int:
    verb, *words = sys.argv[1:]
    note("docker", verb=verb, words=words)
    if verb == "build":
        return build(words)
    if verb in ("tag", "push"):
        if words[0] not in images():
            refuse(f"there is no image {words[0]}")
        with IMAGES.open("a") as file:
            file.write(words[-1] + "\n")
        return 0
    return run(words) if verb == "run" else 2


def images() -> list[str]:
    return IMAGES.read_text().split() if IMAGES.exists() else []


def build(words: list[str]) -> int:
    options = dict(zip(words[:-1:2], words[1:-1:2], strict=True))
    if not Path(options["-f"]).is_file() or words[-1] != ".":
        refuse(f"{options['-f']} or {words[-1]} is not there")
    IMAGES.write_text(options["-t"] + "\n")
    return 0


def run(words: list[str]) -> int:
    variables: dict[str, str] = {}
    mounts: list[str] = []
    while words[0].startswith("-"):
        option = words.pop(0)
        if option in ALONE:
            continue
        if option not in WITH_VALUE:
            refuse(f"unknown option {option}")
        value = words.pop(0)
        if option == "-v":
            mounts.append(value.split(":")[1])
        elif option == "-e":
            name, _, text = value.partition("=")
            variables[name] = text
        elif option == "--env-file":
            variables |= read_env_file(value)
    image, *command = words
    if image not in images():
        refuse(f"there is no image {image}")
    outside = [v for v in variables.values() if v.startswith("/") and not below(v, mounts)]
    if outside:
        refuse(f"not mounted: {outside}")
    if "tools/selftest.py" in command:
        launch = "selftest"
    else:
        launch = new_launch("docker", variables.get("NNODES", "1"))
    return start(command, launch, variables).wait()


def below(path: str, mounts: list[str]) -> bool:
    return any(path.startswith(f"{mount}/") and Path(mount).is_dir() for mount in mounts)


if __name__ == "__main__":
    sys.exit(main())
