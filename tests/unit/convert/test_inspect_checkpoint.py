"""What ``inspect`` says of how a checkpoint was made, also of one made by version 0.1.0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.convert.inspect_checkpoint import describe, format_description
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.utils.errors import UserError
from tests.helpers.tiny_hf import write_language, write_vision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    llm, vision = write_language(folder / "llm"), write_vision(folder / "vision")
    return upcycle_checkpoint(llm, vision, folder / "checkpoint")


def test_the_conversion_report(checkpoint: Path) -> None:
    found = describe(checkpoint)
    assert found["conversion"]["operation"] == "upcycle"
    assert (found["conversion"]["experts"], found["conversion"]["equal_experts"]) == (8, 8)
    assert "experts that equal the dense FFN: 8 of 8" in format_description(found)


def test_the_report_under_its_earlier_name(checkpoint: Path) -> None:
    """Its digests were SHA-256 and CRC-32; nothing else of it has changed."""
    report, earlier = checkpoint / "conversion_report.json", checkpoint / "receipt.json"
    want = describe(checkpoint)["conversion"]
    content = json.loads(report.read_text()) | {
        "digests": {"sources": "sha256", "tensors": "crc32"}
    }
    report.rename(earlier)
    try:
        earlier.write_text(json.dumps(content))
        assert describe(checkpoint)["conversion"] == want
        earlier.write_text("{")
        with pytest.raises(UserError, match="receipt.json cannot be read"):
            describe(checkpoint)
        earlier.unlink()
        assert describe(checkpoint)["conversion"] is None
    finally:
        report.write_text(json.dumps(content))
