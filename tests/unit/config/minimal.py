"""The smallest complete configuration, as a file, for tests that change one thing in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig

MINIMAL = """\
output: runs/test
language: {preset: tiny-llama}
vision: {preset: tiny-siglip}
stage: {preset: stage-joint}
data:
  sources: [{records: records.json, images: images}]
  tokenizer: tokenizer
  sequence_length: 64
train: {global_batch_size: 4, steps: 3}
"""


def load_minimal(
    folder: Path,
    overrides: Sequence[str] = (),
    text: str = MINIMAL,
    environ: Mapping[str, str] | None = None,
) -> RunConfig:
    """Write ``text`` into ``folder`` and load it."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, environ={} if environ is None else environ)
