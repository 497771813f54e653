"""Load an exported directory with transformers; every problem is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def check_export(directory: str | Path) -> Path:
    """The directory, if it looks like an export.

    Raises:
        UserError: It does not.
    """
    folder = Path(directory)
    advice = "write one with tools/convert.py export"
    if not folder.is_dir():
        raise UserError(f"{folder} is no directory: name an export, or {advice}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no export, it has no config.json: {advice}.")
    config = read_json_object(folder / "config.json", advice)
    if config.get("model_type") != "moiie":
        raise UserError(
            f"{folder} is no export, model_type in its config.json is {config.get('model_type')} "
            f"instead of moiie: {advice}."
        )
    return folder


def chosen_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one.

    Raises:
        UserError: torch does not know the device or does not find it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"The device is {name} ({reason}): use auto, cpu or cuda.") from error
    return device


def load_processor(folder: Path) -> Any:
    """The processor of an export.

    Raises:
        UserError: See ``load_model``.
    """
    from transformers import AutoProcessor

    return _from_pretrained(AutoProcessor, folder)


def load_model(folder: Path, device: torch.device, dtype: str = "auto") -> Any:
    """The model of an export, in evaluation mode.

    Args:
        folder: Its code is run.
        device: Where to put it.
        dtype: ``auto`` for that of the files, ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UserError: An unknown dtype, a transformers that the export's code refuses, or files that
            are missing or damaged.
    """
    from transformers import AutoModelForImageTextToText

    if dtype != "auto" and dtype not in _DTYPES:
        raise UserError(f"The dtype is {dtype}: use auto, {', '.join(_DTYPES)}.")
    model, found = _from_pretrained(
        AutoModelForImageTextToText,
        folder,
        dtype=_DTYPES.get(dtype, "auto"),
        output_loading_info=True,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}: export it again."
        )
    return model.to(device).eval()


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True, **options
        )
    except ImportError as error:  # the export's own words if transformers is too old or too new
        raise UserError(_line(error)) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded ({_line(error)}): export it again.") from error
    except Exception as error:  # safetensors has errors of its own for damaged files
        if type(error).__module__.startswith("safetensors"):
            raise UserError(
                f"{folder} cannot be loaded ({_line(error)}): export it again."
            ) from error
        raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
