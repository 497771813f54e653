"""Prints as JSON what the installed lmms-eval says: ``python read_tasks.py TASK...``."""

from __future__ import annotations

import json
import sys

from datasets.naming import camelcase_to_snakecase
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config


def main() -> None:
    index = TaskManager().task_index
    found = {}
    for name in sys.argv[1:]:
        config = load_yaml_config(index[name]["yaml_path"], mode="simple") if name in index else {}
        path = config.get("dataset_path", "/")
        namespace, last = path.split("/")
        found[name] = {
            "path": path,
            "config": config.get("dataset_name"),
            "split": config.get("test_split"),
            "metrics": [metric["metric"] for metric in config.get("metric_list", [])],
            "cache": f"{namespace}___{camelcase_to_snakecase(last)}",
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
