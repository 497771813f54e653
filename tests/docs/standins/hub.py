"""In place of ``hf``: ``hf download REPOSITORY ... --local-dir DIR`` copies tiny files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from common import SETTINGS, note, refuse


def main() -> None:
    verb, repository, *words = sys.argv[1:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    if verb != "download" or not options.keys() <= {"--exclude", "--repo-type", "--local-dir"}:
        refuse(f"unknown command {sys.argv[1:]}")
    source = Path(SETTINGS["hub"]) / repository
    if not source.is_dir():
        refuse(f"there is no {repository}")
    note("hf", repository=repository, kind=options.get("--repo-type", "model"))
    shutil.copytree(source, options["--local-dir"], dirs_exist_ok=True)


if __name__ == "__main__":
    main()
