"""In place of ``python``: makes training tiny; of some launches it keeps the words alone.

``SETTINGS["real"]`` lists the launches that train, by LAUNCH (``common.new_launch``); ``host`` are
commands outside of them.
"""

from __future__ import annotations

import os
import re
import sys

from common import SETTINGS, note

NOTED = ("NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "BACKBONE", "OUTPUT", "LAUNCH")
CONFIG = re.compile(r"examples/(configs|ablations)/[\w\-]+\.yaml$")
SELFTEST, PLAN = "tools/selftest.py", "tools/plan.py"
UNFINISHED = 3  # exit code of tools/train.py --is-done
TORCHRUN = "torch.distributed.run"


def main() -> None:
    words = sys.argv[1:]
    launch = os.environ.get("LAUNCH", "host")
    variables = {name: os.environ[name] for name in NOTED if name in os.environ}
    if words[0] == "-m" and words[1] != TORCHRUN:  # a module of Python's library
        os.execv(sys.executable, [sys.executable, *words])
    note("python", words=words, variables=variables, worker="LOCAL_RANK" in os.environ)
    if SELFTEST in words or (PLAN in words and " ".join(words[1:]) not in SETTINGS["plans"]):
        return
    if launch not in SETTINGS["real"]:
        sys.exit(UNFINISHED if "--is-done" in words else 0)
    is_plan = PLAN in words
    words = [part for word in words for part in made_tiny(word, launch)]
    if is_plan:  # enough samples for 64 ranks
        words.append("train.global_batch_size=128")
    if TORCHRUN in words:
        words[words.index("--nproc-per-node") + 1] = "1"
    os.execv(SETTINGS["python"], [SETTINGS["python"], *words])


def made_tiny(word: str, launch: str) -> list[str]:
    """A word of a command line; behind a configuration, what makes that run tiny."""
    if not CONFIG.search(word):
        return [word]
    overrides = list(SETTINGS["overrides"])
    if not word.endswith("stage1.yaml"):
        overrides.append("stage.template=phi3")  # the markers that the built-in tokenizer has
        overrides += SETTINGS["stage2"].get(launch, [])
    return [word, *overrides]


if __name__ == "__main__":
    main()
