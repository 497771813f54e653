"""What runs is Transformer Engine's own code, with the few changes that wheel.py names."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import megatron.core.extensions.transformer_engine
import pytest
import torch
import transformer_engine
from megatron.core.optimizer import Adam
from megatron.core.utils import get_te_version
from transformer_engine.pytorch import module
from transformer_engine.pytorch.optimizers import FusedAdam

from tests.helpers.launch import environment
from tests.te.standin.install import VARIABLE, Followed
from tests.te.standin.patches import check_found
from tests.te.standin.wheel import rewrite


def test_comes_from_the_directory() -> None:
    directory = Path(os.environ[VARIABLE])
    for part in (transformer_engine, module.linear, module.grouped_linear):
        assert Path(inspect.getfile(part)).is_relative_to(directory)
    (wheel,) = directory.glob("transformer_engine-*.dist-info")
    assert wheel.name == f"transformer_engine-{transformer_engine.__version__}.dist-info"
    assert str(get_te_version()) == transformer_engine.__version__
    assert Adam is FusedAdam


def test_what_is_changed() -> None:
    source = '''
import triton.language as tl
from onnxscript import opset18
import torch
def f(x, device="cuda"):
    """The word cuda stays in sentences."""
    assert x.is_cuda and torch.cuda.is_available()
    return torch.empty(1, device=torch.device("cuda", 3)), torch.cuda.Stream
'''
    want = '''
import te_absent.triton.language as tl
from te_absent.onnxscript import opset18
import torch
def f(x, device="cpu"):
    """The word cuda stays in sentences."""
    assert True and True
    return torch.empty(1, device=torch.device("cpu")), torch.cuda.Stream
'''
    assert ast.unparse(rewrite(source)) == ast.unparse(ast.parse(want))


def test_absent_packages_stay_absent_for_others() -> None:
    """torch would compile with a Triton that it finds; newer Megatron-Cores need the real one."""
    is_installed = any(distribution.name == "triton" for distribution in distributions())
    assert (importlib.util.find_spec("triton") is not None) == is_installed
    assert torch.utils._triton.has_triton_package() is is_installed


def test_a_missing_wheel_ends_a_process() -> None:
    words = environment() | {VARIABLE: "/nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", "pass"], env=words, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0 and "holds no Transformer Engine" in result.stderr


def test_megatron_does_not_go_on_without_it() -> None:
    """It sets a flag only; the hook on that module's import looks at it."""
    with pytest.raises(RuntimeError, match="could not import"):
        check_found(SimpleNamespace(HAVE_TE=False))
    assert isinstance(megatron.core.extensions.transformer_engine.__loader__, Followed)
