"""``tools/train.py`` that also writes which records its steps were given, to RECORD_IDS."""

from __future__ import annotations

import os
import runpy
from typing import Any

from moiie_megatron.training import run


def main() -> None:
    plain_step = run.train_step
    with open(os.environ["RECORD_IDS"], "a") as file:

        def recorded(
            config: Any, context: Any, train_state: Any, batches: Any, **options: Any
        ) -> Any:
            for batch in batches:
                file.write("".join(f"{name}\n" for name in batch.record_ids))
            return plain_step(config, context, train_state, batches, **options)

        run.train_step = recorded
        runpy.run_path("tools/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
