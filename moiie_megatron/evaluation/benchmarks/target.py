"""What is evaluated: an export, or a model behind an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from moiie_megatron.utils.errors import UserError

_SECONDS: Final = 30  # for a server to say which models it has
_SPECIAL: Final = frozenset(",'\"{}[]")  # lmms-eval divides --model_args at these


class Target(Protocol):
    """A model that lmms-eval can ask."""

    @property
    def lmms_model(self) -> str:
        """The name of its class among lmms-eval's models."""

    def description(self) -> str:
        """For a person."""

    def identity(self) -> dict[str, Any]:
        """What the answers depend on; changes when the model does."""

    def arguments(self) -> dict[str, Any]:
        """Of the class of lmms-eval's model."""


@dataclass(frozen=True)
class ExportTarget:
    """An exported directory.

    Attributes:
        directory: Absolute.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` for that of the files.
        expert: Every MoE layer uses this expert alone.
    """

    directory: Path
    device: str = "auto"
    dtype: str = "auto"
    expert: str | None = None
    lmms_model: str = field(default="moiie", init=False)

    def description(self) -> str:
        return str(self.directory) + (f", expert {self.expert} alone" if self.expert else "")

    def identity(self) -> dict[str, Any]:
        return {
            "export": str(self.directory),
            "files": _digest(self.directory),
            "dtype": self.dtype,
            "expert": self.expert,
        }

    def arguments(self) -> dict[str, Any]:
        arguments = {
            "pretrained": argument_path(self.directory),
            "device": self.device,
            "dtype": self.dtype,
        }
        return arguments | ({"expert": self.expert} if self.expert else {})


@dataclass(frozen=True)
class ServerTarget:
    """A model behind a server.

    Attributes:
        url: ``http://HOST:PORT/v1``.
        model: The name that the server gives it.
        timeout: Seconds for one request.
        retries: Attempts for one request.
    """

    url: str
    model: str
    timeout: int = 600
    retries: int = 3
    lmms_model: str = field(default="moiie_server", init=False)

    def description(self) -> str:
        return f"{self.model} at {self.url}"

    def identity(self) -> dict[str, Any]:
        return {"server": self.url, "model": self.model}

    def arguments(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "model": self.model,
            "timeout": self.timeout,
            "max_retries": self.retries,
        }


def find_server(url: str, model: str | None, key: str) -> str:
    """The name of the model to ask: ``model``, or the only one that the server has.

    Raises:
        UserError: The server does not answer, or has another model or several.
    """
    base = url.rstrip("/")
    request = urllib.request.Request(f"{base}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            names = [entry["id"] for entry in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{base}/models does not answer as an OpenAI-compatible server does ({error}): start "
            "the server, or correct the URL, which ends in /v1."
        ) from error
    if model is None and len(names) == 1:
        return str(names[0])
    if model not in names:
        has = ", ".join(map(str, names[:5])) or "none"
        what = "no model is named" if model is None else f"--model is {model}"
        raise UserError(f"{base} has the models {has} and {what}: name one of them by --model.")
    return str(model)


def argument_path(path: Path) -> str:
    """A path for ``--model_args``.

    Raises:
        UserError: It has a character that lmms-eval divides arguments at.
    """
    found = sorted(_SPECIAL & set(str(path)))
    if found:
        raise UserError(
            f"{path} has the character {found[0]} in its name, at which lmms-eval divides its "
            "arguments: use another name."
        )
    return str(path)


def model_args(arguments: Mapping[str, Any]) -> str:
    """The value of lmms-eval's ``--model_args``."""
    return ",".join(f"{name}={value}" for name, value in arguments.items() if value is not None)


def _digest(directory: Path) -> str:
    """Of the small files' contents, and of the weights' sizes and times."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        elif file.suffix in (".json", ".py", ".jinja", ".model"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
