"""Whatever a file or an override says: a configuration, or one sentence; nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from moiie_megatron.config.load import dump_config, load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.yaml_text import parse, write
from moiie_megatron.utils.errors import UserError
from tests.unit.config.minimal import MINIMAL

VALUES: Final[list[Any]] = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 2**31, 2**63, 2**64, -(2**70), 10**60),
    *(0.0, 0.5, 1.0, -0.5, 1e-320, 1e-31, 1e31, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "all",
        "tokenizer",
        "1e-3",
        "010",
        "x" * 5000,
        "${HOME}",
        "${NOWHERE}",
        "$${X}",
        "{",
    ),
    *([], [1], [1, 2], [[]], ["x"], [0, 10**30], [1e300] * 4, [1.0] * 4, {}, {"a": 1}, {1: 2}),
    *({"preset": 3}, {"preset": "tiny-clip"}, {"factor": 2.0}, {"vision": None}, {"visoin": None}),
]
# Pieces of YAML text, put together at random.
PIECES: Final = (
    *("a", "b: ", "- ", "[", "]", "{", "}", ",", ": ", "\n", "  ", "&a ", "*a", "<<: ", "? ", "| "),
    *(
        "010",
        "1:30",
        "0x1F",
        "1_0",
        ".inf",
        "yes",
        "~",
        "'",
        '"',
        "\\0",
        "\t",
        "# ",
        "!!int ",
        "!x ",
    ),
    *("!!timestamp ", "!!set ", "!!binary ", "2024-99-99", "---\n", "%YAML 9\n", "\x00", "\ud800"),
)
REPEATS = 150


def _keys(schema: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all fields, sections included."""
    for name, node in schema.get("properties", {}).items():
        yield prefix + name
        for member in (node, *node.get("anyOf", ())):
            if "$ref" in member:
                inner = defs[member["$ref"].rpartition("/")[2]]
                yield from _keys(inner, defs, f"{prefix}{name}.")


def _check(path: Path, overrides: list[str]) -> bool:
    """Load; whether there is a configuration, which must be what its own file says."""
    try:
        config = load_config(path, overrides, environ={"HOME": "/root"})
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), (overrides, str(error))
        return False
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again, environ={}) == config, overrides
    return True


def test_values_of_every_key(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    schema = RunConfig.model_json_schema()
    keys = [*_keys(schema, schema["$defs"]), "megatron.hidden_dropout", "megatron.init_method_std"]
    keys += ["megatron.recompute_modules", "stage.learning_rates.moe", "megatron.no", "base"]
    assert len(keys) > 90
    found = [
        _check(path, [f"{key}={write(value, flow=True).removesuffix('...' + chr(10))}"])
        for key in keys
        for value in rng.sample(VALUES, 2)
    ]
    assert 10 < sum(found) < len(found) - 50  # both happen


def test_texts(tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "run.yaml"
    for _ in range(REPEATS):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        try:
            parse(text, "text")
        except UserError as error:
            assert "\n" not in str(error), (text, str(error))
        lines = MINIMAL.splitlines()
        lines.insert(rng.randrange(len(lines)), text)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        _check(path, [])


def test_overrides_without_sense(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    deep = ".".join(["a"] * 5000)
    for override in (
        "",
        "=",
        "a",
        ".=1",
        f"{deep}=1",
        "output.a.b=1",
        "a\n=1",
        f"output={'[' * 9999}",
    ):
        assert not _check(path, [override])
