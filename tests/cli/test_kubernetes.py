"""examples/kubernetes: what a pod does with signals and results, and what the manifests say."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.launch import ROOT, environment

FOLDER = ROOT / "examples/kubernetes"
MANIFESTS = ("one-node.yaml", "eight-nodes.yaml")
CONFIG = "examples/configs/llama3-stage1.yaml"
TIMEOUT = 60
UNSET = ("NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "JOB_COMPLETION_INDEX", "NODE_RANK")

# In place of Python: notes its words and ends with the next code of such a question, or waits for a
# signal where that is "wait": SIGTERM, or as torchrun for a worker that SIGUSR1 ends.
STAND_IN = """#!/bin/bash
echo "$RDZV_ENDPOINT $*" >> calls
case "$*" in
    *--dry-run*) code=dry-run ;;
    *--is-done*) code=is-done ;;
    *) code=train ;;
esac
code=$(head -n 1 codes/$code && sed -i 1d codes/$code)
if [[ $code == wait && $* == *torch.distributed.run* ]]; then
    "$REAL_PYTHON" -c "$WORKER"
    exit
elif [[ $code == wait ]]; then
    touch started
    exec sleep 30
fi
exit "$code"
"""
WORKER = """
import pathlib, signal, time

def save(*_):
    pathlib.Path("saved").touch()
    raise SystemExit

signal.signal(signal.SIGUSR1, save)
pathlib.Path("started").touch()
time.sleep(30)
"""


class Pod:
    """A folder in which ``run.sh`` finds a Python that answers as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "codes").mkdir()
        program = folder / "python"
        program.write_text(STAND_IN)
        program.chmod(0o755)
        self.answer()

    def answer(self, dry_run: Any = 0, is_done: Any = (3, 0), train: Any = 0) -> None:
        """The exit codes of every question, in order; "wait": until a signal comes."""
        for name, codes in (("dry-run", dry_run), ("is-done", is_done), ("train", train)):
            codes = codes if isinstance(codes, tuple) else (codes,)
            (self.folder / "codes" / name).write_text("".join(f"{code}\n" for code in codes))

    def start(self, **variables: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in environment().items() if name not in UNSET}
        return subprocess.Popen(
            ["bash", str(FOLDER / "run.sh"), CONFIG, "train.seed=2"],
            env={
                **kept,
                "PYTHON": str(self.folder / "python"),
                "REAL_PYTHON": sys.executable,
                "WORKER": WORKER,
                **variables,
            },
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **variables: str) -> tuple[int, list[str]]:
        """The exit code, and what Python was called with."""
        with self.start(**variables) as process:
            process.communicate(timeout=TIMEOUT)
        return process.returncode, (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_a_run_from_start_to_end(pod: Pod) -> None:
    code, calls = pod.run(NPROC_PER_NODE="8")

    words = f"{ROOT}/examples/kubernetes/../../tools/train.py {CONFIG} train.seed=2"
    words = words.replace("/examples/kubernetes/../..", "")
    assert code == 0
    assert calls[0] == f" {words} --dry-run"
    assert calls[1] == calls[3] == f" {words} --is-done"
    assert calls[2].startswith(" -m torch.distributed.run --nproc-per-node 8 --standalone ")
    assert calls[2].endswith(words)


@pytest.mark.parametrize(
    ("answers", "code", "calls"),
    [
        ({"dry_run": 1}, 2, 1),
        ({"is_done": 0}, 0, 2),
        ({"is_done": 1}, 1, 2),
        ({"train": 1}, 1, 3),
        ({"train": 2}, 1, 3),
        ({"is_done": (3, 3)}, 3, 4),
        ({"is_done": (3, 1)}, 1, 4),
    ],
    ids=["wrong", "finished", "broken", "failed", "failed-with-2", "stopped-by-another", "lost"],
)
def test_exit_codes(pod: Pod, answers: dict[str, Any], code: int, calls: int) -> None:
    pod.answer(**answers)
    found, lines = pod.run()
    assert (found, len(lines)) == (code, calls)


@pytest.mark.parametrize("moment", ["dry_run", "is_done", "train"])
def test_sigterm_ends_with_3(pod: Pod, moment: str) -> None:
    """Before training there is nothing to save; while training the run saves."""
    pod.answer(**{moment: "wait"})
    with pod.start() as process:
        deadline = time.monotonic() + TIMEOUT
        while not (pod.folder / "started").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 3
    assert (pod.folder / "saved").exists() == (moment == "train")
    calls = (pod.folder / "calls").read_text()
    assert ("torch.distributed.run" in calls) == (moment == "train")


def test_pods_meet_at_pod_0(pod: Pod) -> None:
    """Pod 0 names itself; the others start when its store answers."""
    code, calls = pod.run(NNODES="2", RDZV_ENDPOINT="moiie-0.moiie:29500", JOB_COMPLETION_INDEX="0")
    assert code == 0
    assert "localhost:29500 -m torch.distributed.run" in calls[2]
    assert " --rdzv-endpoint localhost:29500 " in calls[2]

    pod.answer()
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{store.getsockname()[1]}"
        with pod.start(NNODES="2", RDZV_ENDPOINT=endpoint, JOB_COMPLETION_INDEX="1") as process:
            time.sleep(0.5)
            lines = (pod.folder / "calls").read_text().splitlines()[4:]
            assert not any("torch.distributed.run" in line for line in lines)
            store.listen()
            process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    lines = (pod.folder / "calls").read_text().splitlines()[4:]
    assert f" --nnodes 2 --rdzv-endpoint {endpoint} " in lines[2]


def test_a_pod_0_that_does_not_come(pod: Pod) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unused.getsockname()[1]}"
    variables = {"RDZV_ENDPOINT": endpoint, "JOB_COMPLETION_INDEX": "1", "JOIN_TIMEOUT": "0"}
    with pod.start(NNODES="2", **variables) as process:
        err = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 1
    assert err == f"Pod 0 has not opened {endpoint} for 0 s.\n"


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def _job(name: str) -> dict[str, Any]:
    (job,) = (document for document in _documents(name) if document["kind"] == "Job")
    return job


# The fields in use and the kind of their values, from the API reference of Kubernetes 1.29 to 1.37.
POD = {
    "subdomain": str,
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsUser": int, "fsGroup": int, "fsGroupChangePolicy": str},
    "tolerations": [{"key": str, "operator": str, "effect": str, "tolerationSeconds": int}],
    "containers": [
        {
            "name": str,
            "image": str,
            "args": [str],
            "envFrom": [{"configMapRef": {"name": str}}],
            "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
            "resources": {
                "requests": {"cpu": int, "memory": str},
                "limits": {"nvidia.com/gpu": int},
            },
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
}
OBJECT = {"apiVersion": str, "kind": str, "metadata": {"name": str}}
FIELDS: dict[str, Any] = {
    "Service": {"clusterIP": str, "publishNotReadyAddresses": bool,
                "selector": {"batch.kubernetes.io/job-name": str}},
    "PersistentVolumeClaim": {"accessModes": [str], "resources": {"requests": {"storage": str}}},
    "Job": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimitPerIndex": int,
        "maxFailedIndexes": int,
        "podReplacementPolicy": str,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": str,
                    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
                    "onPodConditions": [{"type": str, "status": str}],
                }
            ]
        },
        "template": {"spec": POD},
    },
}  # fmt: skip


def _wrong(value: Any, wanted: Any, path: str) -> list[str]:
    """Paths of fields that do not exist, or whose value is of another kind."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return [path]
        return [
            found
            for key, part in value.items()
            for found in (
                _wrong(part, wanted[key], f"{path}.{key}") if key in wanted else [f"{path}.{key}"]
            )
        ]
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return [path]
        return [x for part in value for x in _wrong(part, wanted[0], f"{path}[]")]
    return [] if type(value) is wanted else [path]


@pytest.mark.parametrize("name", ["volumes.yaml", *MANIFESTS])
def test_fields_are_those_of_kubernetes(name: str) -> None:
    for document in _documents(name):
        spec = {"spec": FIELDS[document["kind"]]}
        assert _wrong(document, OBJECT | spec, document["kind"]) == []
        version = "batch/v1" if document["kind"] == "Job" else "v1"
        assert document["apiVersion"] == version


def test_the_rule_itself() -> None:
    document = {"apiVersion": "v1", "kind": "Job", "metadata": {"name": 7}, "specs": {}}
    assert _wrong(document, OBJECT, "Job") == ["Job.metadata.name", "Job.specs"]
    assert _wrong({"args": "bash"}, POD["containers"][0], "c") == ["c.args"]  # type: ignore[index]


@pytest.mark.parametrize(("name", "nodes"), list(zip(MANIFESTS, (1, 8), strict=True)))
def test_numbers_of_nodes_agree(name: str, nodes: int) -> None:
    """Also where ``sed`` changes the marked lines, as the pages do."""
    for count in (nodes, 4):
        text = re.sub(
            rf"^(.*){nodes}(.* # nodes)$",
            rf"\g<1>{count}\2",
            (FOLDER / name).read_text(),
            flags=re.M,
        )
        (job,) = (document for document in yaml.safe_load_all(text) if document["kind"] == "Job")
        spec = job["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        numbers = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert spec["completions"] == spec["parallelism"] == int(numbers["NNODES"]) == count
        assert int(numbers["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert text.count("# nodes") - text.count("end with # nodes") == 3


def test_pods_find_pod_0_through_the_service() -> None:
    service, job = _documents("eight-nodes.yaml")
    pod = job["spec"]["template"]["spec"]
    name = service["metadata"]["name"]
    assert pod["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"]["batch.kubernetes.io/job-name"] == job["metadata"]["name"]
    env = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert env["RDZV_ENDPOINT"]["value"] == f"{job['metadata']['name']}-0.{name}:29500"
    assert env["LOCAL_ADDRESS"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_a_pod_needs(name: str) -> None:
    job = _job(name)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # Both are conditions of podFailurePolicy and backoffLimitPerIndex.
    assert (pod["restartPolicy"], spec["completionMode"]) == ("Never", "Indexed")
    assert spec["podReplacementPolicy"] == "Failed"
    codes = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert codes == {2: "FailJob", 3: "Ignore"}  # run.sh
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", "train") == container["name"]
    assert pod["terminationGracePeriodSeconds"] == 600

    assert container["args"][:2] == ["bash", "examples/kubernetes/run.sh"]
    for file in container["args"][2:]:
        for backbone in ("llama3", "phi3"):
            assert (ROOT / file.replace("$(BACKBONE)", backbone)).is_file()
    known = (ROOT / "examples/torchrun.sh").read_text()
    assert all(f"# {entry['name']} " in known for entry in container["env"])

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    claims = {document["metadata"]["name"] for document in _documents("volumes.yaml")}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes.values()
        if "persistentVolumeClaim" in volume
    }
    assert used == claims
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert f"ARG UID={pod['securityContext']['runAsUser']}\n" in dockerfile


def test_one_node_and_eight_differ_in_the_nodes_alone() -> None:
    one, eight = (_job(name) for name in MANIFESTS)
    for job, count in ((one, 1), (eight, 8)):
        assert (job["spec"].pop("completions"), job["spec"].pop("parallelism")) == (count, count)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        container["env"] = [
            entry for entry in container["env"] if entry["name"] == "NPROC_PER_NODE"
        ]
    eight["spec"]["template"]["spec"].pop("subdomain")
    assert one == eight


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_commented_out_can_be_used(name: str) -> None:
    """The options for RDMA in comments give valid manifests when their marks are removed."""
    text = (FOLDER / name).read_text()
    options = r"^( +)# ((?:- \{|hostNetwork|dnsPolicy|rdma/|hugepages|securityContext).*)$"
    changed, count = re.subn(options, r"\1\2", text, flags=re.MULTILINE)
    assert count == 9
    (job,) = (document for document in yaml.safe_load_all(changed) if document["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert {"rdma/hca_shared_devices", "hugepages-2Mi"} < container["resources"]["limits"].keys()
    assert {"hugepages"} <= {mount["name"] for mount in container["volumeMounts"]}
    assert {"hugepages"} <= {volume["name"] for volume in pod["volumes"]}
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"} <= {entry["name"] for entry in container["env"]}
