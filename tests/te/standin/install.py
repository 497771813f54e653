"""Makes Transformer Engine importable in this process.

Nothing is imported here: whoever imports ``transformer_engine`` first pays for it.  A process
whose environment has the variable ``MOIIE_TEST_TE`` installs this at its start
(``tests/te/site/sitecustomize.py``), so programs, their ranks and the fork server see Transformer
Engine as if it were installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "MOIIE_TEST_TE"  # the directory that Transformer Engine's wheel is installed into
SITE = Path(__file__).resolve().parents[1] / "site"
_HERE = "tests.te.standin"
# Whole modules that are ours, and the functions that make them.
_MODULES = {
    "transformer_engine_torch": "extension:make",
    "fused_weight_gradient_mlp_cuda": "apex:make",
}
# Called with a module once it has been imported.
_AFTER_IMPORT = {
    "transformer_engine.common": "patches:no_shared_libraries",
    "transformer_engine.pytorch": "patches:reference_kernels",
    "megatron.core.extensions.transformer_engine": "patches:check_found",
    "moiie_megatron.mcore.device": "patches:use_on_cpu",
}


def install(directory: str) -> None:
    """Let ``transformer_engine`` be found in a directory, over our stand-in for its extension.

    Raises:
        RuntimeError: Megatron-Core, which looks for it once, has been imported already, or the
            directory does not hold it.
    """
    if "megatron.core" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("Transformer Engine has to be installed before Megatron is imported.")
    if not (Path(directory) / "transformer_engine").is_dir():
        raise RuntimeError(f"{VARIABLE} is {directory}, which holds no Transformer Engine.")
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # looks for no shared libraries
    sys.path.append(directory)  # for its version, which is in its .dist-info
    sys.meta_path.insert(0, _Finder(directory))


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{_HERE}.{module}"), function)
    return found


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the wheel's modules and ours, and follows those that are to be patched."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.split(".")[0]
        if fullname in _MODULES:
            return importlib.machinery.ModuleSpec(fullname, _Made(_function(_MODULES[fullname])))
        if top == "te_absent":
            return importlib.machinery.ModuleSpec(
                fullname, _Made(_function("absent:absent_module"), fullname, True), is_package=True
            )
        spec = None
        if top == "transformer_engine":
            spec = _function("wheel:find_spec")(fullname, path, self.directory)
        if fullname not in _AFTER_IMPORT or fullname in self.searching:
            return spec
        if spec is None:
            self.searching.add(fullname)
            spec = importlib.util.find_spec(fullname)
            self.searching.discard(fullname)
        if spec is not None:
            spec.loader = _Followed(spec.loader, _AFTER_IMPORT[fullname])
        return spec


class _Made(importlib.abc.Loader):
    """A module that a function makes."""

    def __init__(self, make: Callable[..., types.ModuleType], *arguments: Any) -> None:
        self.make, self.arguments = make, arguments

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.make(*self.arguments)

    def exec_module(self, module: types.ModuleType) -> None:
        """It is complete."""


class _Followed(importlib.abc.Loader):
    """Loads a module and then calls a function with it."""

    def __init__(self, loader: Any, function: str) -> None:
        self.loader, self.function = loader, function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.loader.exec_module(module)
        _function(self.function)(module)
