"""Read a ``RunConfig`` from a YAML file, presets and ``a.b=c`` overrides, and write it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moiie_megatron.config import yaml_text
from moiie_megatron.config.messages import first_problem, listed, show
from moiie_megatron.config.renamed_keys import rename_keys
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.utils.errors import UserError

_MAX_KEYS = 10  # in front of the = of an override; the schema has up to four
# ${NAME} is a variable; $${NAME} is the text ${NAME} (each further $ is kept).
_VARIABLE = re.compile(r"(\$+)\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> RunConfig:
    """Read and check the configuration of a run.

    A section may name a preset, ``language: {preset: phi3-mini, pretrained: weights/phi3}``; the
    section's other keys are merged into the preset: mappings key by key, lists and single values
    replace those of the preset.  A file may name another one, ``base: phi3-stage2.yaml``
    (relative to its own directory), and is merged into it in the same way before presets are
    read.  ``data.sources`` may name a YAML file that holds the list
    (``examples/configs/mixtures``), and so may ``data.validation.sources``.  ``${NAME}`` in a
    value is replaced by the environment variable, ``$${NAME}`` is the text ``${NAME}``.  Other
    relative paths are relative to the current directory.

    Args:
        path: YAML file.
        overrides: ``a.b=c`` each, where c is YAML; they take precedence over the file.
        environ: Variables for ``${NAME}``; default: the process environment.

    Raises:
        UserError: A file is missing or broken, ``base`` leads back to itself, a key, preset or
            variable is unknown, a value has a wrong type, or ``check_config`` refuses a
            combination.
    """
    environ = os.environ if environ is None else environ
    return _completed(_read_over_base(Path(path), environ), overrides, environ)


def load_saved_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the resolved configuration of a run or a checkpoint (``dump_config``).

    Earlier versions, in which keys had other names, are read too.

    Args:
        path: ``config.yaml`` of a run, ``run.yaml`` of a checkpoint.
        overrides: As in ``load_config``.

    Raises:
        UserError: As ``load_config``.
    """
    return _completed(rename_keys(_read(Path(path))), overrides, {})


def _completed(
    data: dict[str, Any], overrides: Sequence[str], environ: Mapping[str, str]
) -> RunConfig:
    for override in overrides:
        data = _override(data, override)
    data = _expand(data, environ, ())
    for keys in (("data", "sources"), ("data", "validation", "sources")):
        data = _read_sources(data, keys, environ)
    data = {section: _apply_preset(section, value) for section, value in data.items()}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(first_problem(error, RunConfig)) from None
    check_config(config)
    return config


def dump_config(config: RunConfig) -> str:
    """``config`` as YAML with all values; ``load_config`` reads it back unchanged."""
    return yaml_text.write(_escape(config.model_dump()))


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides ``a.b=c`` as the mapping that a file would hold.

    Raises:
        UserError: One has another form, or its value is no YAML.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        data = _override(data, override)
    return data


def preset_names(section: str) -> list[str]:
    """The presets of a section."""
    return sorted(name for name in preset_files() if section in _read_preset(name))


def preset_files() -> dict[str, Traversable]:
    """The file of every preset, by name."""
    directory = resources.files("moiie_megatron.config") / "presets"
    return {
        file.name.removesuffix(".yaml"): file
        for file in directory.iterdir()
        if file.name.endswith(".yaml")
    }


def _read(path: Path) -> dict[str, Any]:
    data = yaml_text.parse(_text(path, "The configuration"), where=str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds {show(data)}: use a mapping with the keys "
            f"{listed(RunConfig.model_fields, 'and')}."
        )
    return data


def _text(path: Path, what: str) -> str:
    """The text of a file, or as much of it as ``yaml_text.parse`` needs to refuse it."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(yaml_text.MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist: name a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{what} {path} cannot be read: {reason}.") from None


def _read_sources(
    data: dict[str, Any], keys: tuple[str, ...], environ: Mapping[str, str]
) -> dict[str, Any]:
    """``data`` with a list of sources read from a file, if the value at ``keys`` names one."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return data
    name, path = ".".join(keys), Path(value)
    sources = yaml_text.parse(_text(path, name), where=str(path))
    if not isinstance(sources, list):
        raise UserError(
            f"{name} is {str(path)!r}, which holds {show(sources)}: name a YAML file that "
            "holds a list with records and images each."
        )
    return _with_value(data, list(keys), _expand(sources, environ, keys), "")


def _read_over_base(
    path: Path, environ: Mapping[str, str], above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A file merged into its ``base``, recursively; ``above``: the files that led to this one."""
    data = _read(path)
    if "base" not in data:
        return data
    base = _expand(data.pop("base"), environ, ("base",))
    if not isinstance(base, str) or not base:
        raise UserError(f"base is {show(base)} in {path}: name a YAML file.")
    above = (*above, path.resolve())
    below = path.parent / base
    if below.resolve() in above:
        raise UserError(f"base is {show(base)} in {path}, which leads back to a file above it.")
    return _merge(_read_over_base(below, environ, above), data)


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of ``data`` with one override ``a.b=c``."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or len(keys) > _MAX_KEYS:
        raise UserError(f"The override {show(override)} is not of the form section.key=value.")
    return _with_value(
        data, keys, yaml_text.parse(text, where=f"The override {show(override)}"), ""
    )


def _with_value(node: Any, keys: list[str], value: Any, parent: str) -> dict[str, Any]:
    if node is None:  # an absent or empty section
        node = {}
    if not isinstance(node, dict):
        raise UserError(
            f"{parent} is {show(node)}, which has no key {keys[0]}: override {parent} as a whole."
        )
    head, rest = keys[0], keys[1:]
    path = f"{parent}.{head}" if parent else head
    return {**node, head: _with_value(node.get(head), rest, value, path) if rest else value}


def _expand(node: Any, environ: Mapping[str, str], path: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        return {k: _expand(v, environ, (*path, str(k))) for k, v in node.items()}
    if isinstance(node, list):
        return [_expand(v, environ, (*path, str(i))) for i, v in enumerate(node)]
    if not isinstance(node, str):
        return node

    def replace(match: re.Match[str]) -> str:
        dollars, name = match.groups()
        if len(dollars) > 1:
            return match.group()[1:]
        if name not in environ:
            raise UserError(
                f"{'.'.join(path)} is {show(node)}, but the environment variable {name} is not "
                f"set: set it, or write $${{{name}}} for the text itself."
            )
        return environ[name]

    return _VARIABLE.sub(replace, node)


def _escape(node: Any) -> Any:
    """The inverse of ``_expand``, for values without variables."""
    if isinstance(node, dict):
        return {k: _escape(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_escape(v) for v in node]
    return _VARIABLE.sub(r"$\g<0>", node) if isinstance(node, str) else node


def _apply_preset(section: str, value: Any) -> Any:
    """A section merged into its preset, if it names one."""
    if not isinstance(value, dict) or "preset" not in value:
        return value
    name = value["preset"]
    preset = _read_preset(name) if isinstance(name, str) and name in preset_files() else {}
    if section not in preset:
        known = preset_names(section)
        if not known:
            raise UserError(f"{section}.preset is {show(name)}, but {section} has no presets.")
        raise UserError(f"{section}.preset is {show(name)}: use {listed(known)}.")
    own = {key: v for key, v in value.items() if key != "preset"}
    return _merge(preset[section], own)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _read_preset(name: str) -> dict[str, Any]:
    """The content of a preset: one section, by name."""
    file = preset_files()[name]
    data: dict[str, Any] = yaml_text.parse(file.read_text(encoding="utf-8"), where=file.name)
    return data
