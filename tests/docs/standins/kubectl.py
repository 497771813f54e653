"""In place of ``kubectl``: the pods of a Job run here, as processes, when it is applied."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from common import (
    FOLDER,
    MOST_NODES,
    SETTINGS,
    free_port,
    new_launch,
    note,
    read_env_file,
    refuse,
    start,
)

OBJECTS = FOLDER / "objects.json"


def main() -> None:
    verb, *words = sys.argv[1:]
    text = sys.stdin.read() if words[-1] == "-" else None
    note("kubectl", verb=verb, words=words)
    objects: dict[str, Any] = json.loads(OBJECTS.read_text()) if OBJECTS.exists() else {}
    match verb, words:
        case "create", ["configmap", name, source]:
            path = source.removeprefix("--from-env-file=")
            objects[f"ConfigMap/{name}"] = read_env_file(path)
        case "apply", ["-f", file]:
            for manifest in yaml.safe_load_all(text or Path(file).read_text()):
                apply(manifest, objects)
        case "delete", ["job", name, *rest]:
            if not objects.pop(f"Job/{name}", None) and "--ignore-not-found" not in rest:
                refuse(f"there is no job {name}")
        case "patch", ["job", name, "--patch", patch]:
            objects[f"Job/{name}"]["spec"] |= json.loads(patch)["spec"]
        case "get", ["pods", "--selector", "batch.kubernetes.io/job-name=moiie"]:
            pass
        case "logs", _:
            print((FOLDER / "pod-0.log").read_text())
        case _:
            refuse(f"unknown command {verb} {words}")
    OBJECTS.write_text(json.dumps(objects))


def apply(manifest: dict[str, Any], objects: dict[str, Any]) -> None:
    key = f"{manifest['kind']}/{manifest['metadata']['name']}"
    if manifest["kind"] == "Job":
        if key in objects:
            refuse(f"{key} is there already, and its template cannot be changed")
        run_job(manifest, objects)
    objects[key] = manifest


def run_job(job: dict[str, Any], objects: dict[str, Any]) -> None:
    """All pods at once, each a process; noted are their exit codes."""
    spec = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    wanted = [f"PersistentVolumeClaim/{claim}" for claim in claims]
    if "subdomain" in pod:
        wanted.append(f"Service/{pod['subdomain']}")
    missing = [key for key in wanted if key not in objects]
    if missing:
        refuse(f"not there: {missing}")
    variables: dict[str, str] = {}
    for source in container["envFrom"]:
        variables |= objects[f"ConfigMap/{source['configMapRef']['name']}"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    outside = [v for v in variables.values() if v.startswith("/") and not mounted(v, mounts)]
    if outside:
        refuse(f"not mounted: {outside}")
    variables |= {env["name"]: value_of(env) for env in container["env"]}
    launch = new_launch("kubernetes", variables["NNODES"])
    count = spec["completions"]
    note("job", launch=launch, image=container["image"], pods=count)
    if launch in SETTINGS["real"]:
        count = min(count, MOST_NODES)
        host, port = f"{job['metadata']['name']}-0.{pod.get('subdomain')}", free_port()
        variables["NNODES"] = str(count)
        variables["RDZV_ENDPOINT"] = re.sub(
            rf"^{host}:\d+$", f"127.0.0.1:{port}", variables["RDZV_ENDPOINT"]
        )
    else:
        count = 1
    processes = []
    for index in range(count):
        own = {**variables, "JOB_COMPLETION_INDEX": str(index)}
        args = [expanded(word, own) for word in container["args"]]
        with (FOLDER / f"pod-{index}.log").open("w") as log:
            processes.append(start(args, launch, own, log))
    note("pods", launch=launch, codes=[process.wait() for process in processes])


def value_of(env: dict[str, Any]) -> str:
    if env.get("valueFrom") == {"fieldRef": {"fieldPath": "status.podIP"}}:
        return "127.0.0.1"
    return env["value"]


def expanded(word: str, variables: dict[str, str]) -> str:
    """A word of ``args``, its $(NAME) replaced as Kubernetes does it."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word)


def mounted(path: str, mounts: list[str]) -> bool:
    """The page's /models, /data and /runs lie in a folder of the test."""
    inside = path.removeprefix(SETTINGS["storage"])
    return any(inside.startswith(f"{mount}/") for mount in mounts)


if __name__ == "__main__":
    main()
