"""Reads Transformer Engine's Python from its wheel, for a machine without a GPU.

The files stay as they are.  What is compiled differs from them in this, and in nothing else:

- the device ``"cuda"`` is ``"cpu"``, without an index, and ``is_cuda`` and
  ``torch.cuda.is_available()`` are true;
- packages that are not installed and that only kernels or exports need (Triton, ONNX, ...) are
  imported as absent names.
"""

from __future__ import annotations

import ast
import importlib.machinery
import types
from typing import Any

PACKAGE = "transformer_engine"
ABSENT = "te_absent"  # the prefix under which absent packages are imported
_PACKAGES = ("einops", "nvdlfw_inspect", "onnx", "onnxscript", "triton")


def find_spec(name: str, path: Any, directory: str) -> importlib.machinery.ModuleSpec | None:
    """The specification of a module of the wheel in ``directory``."""
    spec = importlib.machinery.PathFinder.find_spec(name, path or [directory])
    if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        spec.loader = _Loader(name, spec.loader.path)
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed tree, and keeps no compiled file."""

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(rewrite(self.get_data(self.path).decode()), self.path, "exec")


def rewrite(source: str) -> ast.Module:
    """The changed tree of a file."""
    return ast.fix_missing_locations(_Rewriter().visit(ast.parse(source)))


class _Rewriter(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.copy_location(ast.Constant("cpu"), node) if node.value == "cuda" else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Constant(True), node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = ast.unparse(node.func)
        if function == "torch.cuda.is_available":
            return ast.copy_location(ast.Constant(True), node)
        if function == "torch.device":
            node.args = node.args[:1]  # the CPU has no index
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        """``import triton.language as tl``; without ``as``, no name has dots in these files."""
        for alias in node.names:
            if alias.name.split(".")[0] in _PACKAGES:
                alias.asname = alias.asname or alias.name
                alias.name = f"{ABSENT}.{alias.name}"
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module and not node.level and node.module.split(".")[0] in _PACKAGES:
            node.module = f"{ABSENT}.{node.module}"
        return node
