"""Call ``module:function`` with the rank, then run a script: ``hooked.py HOOK SCRIPT [words]``."""

from __future__ import annotations

import importlib
import os
import runpy
import sys


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(int(os.environ["RANK"]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
