"""Unpickles objects of a few named kinds and runs nothing else."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar, Final

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.torch_files import load_torch_file

_NUMPY: Final = ("numpy.core.multiarray", "numpy._core.multiarray")
# Tensors and arrays as pickle writes them.
_VALUES: Final = frozenset(
    {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *((module, "_reconstruct") for module in _NUMPY),
    }
)


def unpickle(data: bytes, names: frozenset[tuple[str, str]], what: str) -> Any:
    """An object made of plain values, tensors, arrays and the named classes.

    Args:
        names: Module and name of classes whose construction does no more than keep values.
        what: What the bytes are, for the message.

    Raises:
        UserError: They are damaged or refer to anything else.
    """
    try:
        return _Unpickler(data, names).load()
    except Exception as error:  # damaged pickles raise whatever the opcodes run into
        raise UserError(
            f"{what} cannot be read ({error}): copy the checkpoint again, or use another one."
        ) from error


class _Unpickler(pickle._Unpickler):
    """Python's own, not the one in C: its handling of an opcode can be overridden."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, names: frozenset[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names | _VALUES

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage  # torch's would load any pickle
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the state of an object; of a class or function it would change the program."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, type) or callable(target):
            raise pickle.UnpicklingError(f"it changes {target}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _load_storage(data: bytes) -> Any:
    return load_torch_file(io.BytesIO(data))
