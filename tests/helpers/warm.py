"""Many starts of ``tools/train.py`` for the price of one: imports once, then forks for each.

Run as a script with two arguments: a JSON file that maps names to argument lists, and a folder
for ``NAME.code``, ``NAME.out`` and ``NAME.err``.  Every child is a process of its own that runs
the program as Python would start it; only the imports are shared.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

LIMIT_S = 60


def run_child(arguments: list[str], name: str, out: Path) -> None:
    """Never returns."""
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
    signal.alarm(LIMIT_S)  # a hang ends with SIGALRM's code
    sys.argv = ["tools/train.py", *arguments]
    code = 0
    try:
        runpy.run_path("tools/train.py", run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import moiie_megatron.training.loop  # noqa: F401  what is worth sharing

    for name, arguments in cases.items():
        child = os.fork()
        if not child:
            run_child(arguments, name, out)
        _, status = os.waitpid(child, 0)
        (out / f"{name}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
