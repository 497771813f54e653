"""Call a function with the rank, then run a script: ``hooked.py HOOK SCRIPT [words]``.

``HOOK`` is ``module:function`` or ``module:function,argument,...``, and the arguments are strings.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys


def main() -> None:
    target, *arguments = sys.argv[1].split(",")
    module, _, function = target.partition(":")
    rank = int(os.environ.get("RANK", "0"))
    getattr(importlib.import_module(module), function)(rank, *arguments)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
