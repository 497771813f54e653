"""Names of packages that are not here: they can be imported and looked at, not used."""

from __future__ import annotations

import importlib.machinery
import types
import zlib
from typing import Any


class Absent:
    """Stands for one name: its attributes are absent too, and using it is an error.

    Args:
        name: What the error says was reached.
        returns: Calls give an absent value instead of the error.  Decorators and constants of a
            module are called while it is imported.
    """

    __hash__ = object.__hash__

    def __init__(self, name: str, *, returns: bool = False) -> None:
        self._name = name
        self._returns = returns

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}", returns=self._returns)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._returns:
            raise NotImplementedError(f"{self._name} has no stand-in.")
        return Absent(f"{self._name}()", returns=True)

    def __getitem__(self, key: Any) -> Any:
        """A Triton kernel gets its grid this way, right before it is launched."""
        raise NotImplementedError(f"{self._name} has no stand-in.")

    def __int__(self) -> int:
        """Members of enumerations are put into tables by their numbers."""
        return zlib.crc32(self._name.encode())

    def __repr__(self) -> str:
        return f"<absent {self._name}>"


def absent_module(name: str, returns: bool) -> types.ModuleType:
    """A module, also a package, whose names are all absent."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__version__ = "0"

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return Absent(f"{name}.{wanted}", returns=returns)

    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module
