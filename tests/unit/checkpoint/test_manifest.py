"""Manifests as earlier versions wrote them, and digests of either kind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import xxhash

from moiie_megatron.checkpoint.manifest import MANIFEST_FILE, damage, write_manifest

FILES = {".metadata": b"a", "metadata.json": b"{}", "common.pt": b"bc", "__0_0.distcp": b"def"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_what_is_written_is_what_version_0_1_0_wrote(checkpoint: Path) -> None:
    """So that both read the other's checkpoints; ``sha256sum`` gives the same digests."""
    write_manifest(checkpoint)
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert listed == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    }
    assert damage(checkpoint) is None


@pytest.mark.parametrize("kind", ["sha256", "xxh3_128"])
def test_the_entry_names_the_algorithm(kind: str, checkpoint: Path) -> None:
    digest = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}[kind]
    listed = {n: {"bytes": len(c), kind: digest(c).hexdigest()} for n, c in FILES.items()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps({"files": listed}))
    assert damage(checkpoint) is None
    (checkpoint / "common.pt").write_bytes(b"bd")
    assert damage(checkpoint) == "common.pt is not what was written"


def test_an_entry_without_a_digest_is_known_by_its_size(checkpoint: Path) -> None:
    listed = {name: {"bytes": len(content)} for name, content in FILES.items()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps({"files": listed}))
    assert damage(checkpoint) is None
    (checkpoint / "common.pt").write_bytes(b"longer")
    assert damage(checkpoint) == "common.pt has 6 bytes instead of 2"
