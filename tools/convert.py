"""Convert models: Hugging Face to Megatron checkpoints, and back.

``convert.py upcycle --llm DIR --vision DIR --out CKPT`` turns a dense language model and a vision
encoder into a MoIIE checkpoint; ``convert.py export --ckpt CKPT --out DIR`` turns any checkpoint
into a Hugging Face directory; ``convert.py inspect CKPT`` says what is inside.  ``convert.py
import --hf DIR --out CKPT`` reads an export, or a checkpoint of the reference's code; ``convert.py
extract --ckpt CKPT --expert vision.0 --out DIR`` makes a dense model with one of the experts.
``convert.py verify A B`` compares two models in any format; ``convert.py reshard CKPT --tp N --out
CKPT2`` cuts a checkpoint for a parallel layout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.utils.errors import UserError

MAX_DEGREE = 1 << 20


def add_upcycle(commands: Any) -> None:
    parser = commands.add_parser("upcycle", help="dense language model + vision encoder -> MoIIE")
    parser.add_argument("--llm", required=True, metavar="DIR", help="Hugging Face language model")
    parser.add_argument("--vision", required=True, metavar="DIR", help="vision encoder")
    parser.add_argument("--connector", metavar="FILE", help="safetensors, .bin; default: fresh")
    parser.add_argument("--out", required=True, metavar="CKPT")
    parser.add_argument(
        "--variant", choices=("dense", "vanilla", "modality", "moiie"), default="moiie"
    )
    parser.add_argument("--experts", metavar="V,S,T", help="default: four experts of the paper")
    parser.add_argument("--layers", default="interleaved", help="interleaved, all, or 1,3,5")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--perturb", type=float, default=0.0, help="noise relative to the rms")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    parser.set_defaults(task=upcycle)


def upcycle(arguments: argparse.Namespace) -> None:
    from moiie_megatron.checkpoint.directory import CONFIG_FILE
    from moiie_megatron.config.load import load_saved_config
    from moiie_megatron.convert.hf.config import is_untied_by_weights, untied_note
    from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint

    options = UpcycleOptions(
        variant=arguments.variant,
        experts=_experts(arguments.experts),
        layers=_layers(arguments.layers),
        top_k=arguments.top_k,
        perturb=arguments.perturb,
        seed=arguments.seed,
    )
    notes: list[str] = []
    with progress_bar("upcycling") as progress:
        out = upcycle_checkpoint(
            arguments.llm,
            arguments.vision,
            arguments.out,
            options,
            connector=arguments.connector,
            force=arguments.force,
            progress=progress,
            note=notes.append,
        )
    started = f"{out}: see conversion_report.json there; train with checkpoint.init_from={out}"
    print(started, *notes, sep="\n")
    config = load_saved_config(out / CONFIG_FILE)
    if is_untied_by_weights(config.language, arguments.llm):
        print(f"{untied_note(arguments.llm)}.")
    if config.stage.template == "plain":
        print(
            "The tokenizer has no chat template, so stage.template is plain, which learns the last "
            "answer without its question: set stage.template for conversations."
        )


def add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="any checkpoint -> Hugging Face directory")
    parser.add_argument("--ckpt", required=True, help="checkpoint, or output folder of a run")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(task=export)


def export(arguments: argparse.Namespace) -> None:
    from moiie_megatron.convert.export import export_checkpoint

    notes: list[str] = []
    with progress_bar("exporting") as progress:
        out = export_checkpoint(
            arguments.ckpt,
            arguments.out,
            force=arguments.force,
            progress=progress,
            note=notes.append,
        )
    print_exported(out, notes)


def print_exported(out: Path, notes: list[str]) -> None:
    loads = f"AutoModelForImageTextToText.from_pretrained({str(out)!r}, ...) loads it"
    print(f"{out}: {loads}", *notes, sep="\n")


def add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="trained Hugging Face model -> checkpoint")
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="an export, or trained with the reference's code"
    )
    parser.add_argument("--out", required=True, metavar="CKPT")
    parser.add_argument(
        "--vision", metavar="DIR", help="vision encoder, where --hf does not describe its own"
    )
    parser.add_argument(
        "--experts", metavar="V,S,T", help="where a checkpoint of the reference does not tell"
    )
    parser.add_argument(
        "--last-image-token-as-text",
        action="store_true",
        help="the last image token of every run counts as text, as in the reference's code",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    parser.set_defaults(task=import_)


def import_(arguments: argparse.Namespace) -> None:
    from moiie_megatron.convert.import_hf import import_checkpoint

    with progress_bar("importing") as progress:
        result = import_checkpoint(
            arguments.hf,
            arguments.out,
            vision=arguments.vision,
            groups=_experts(arguments.experts),
            last_image_token_as_text=arguments.last_image_token_as_text,
            force=arguments.force,
            progress=progress,
        )
    print(f"{result.folder}: see conversion_report.json there", *result.notes, sep="\n")


def add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="one expert per layer -> dense Hugging Face model")
    parser.add_argument("--ckpt", required=True, help="checkpoint, or output folder of a run")
    parser.add_argument(
        "--expert",
        required=True,
        metavar="NAME",
        help="vision.0, shared.1, text.0...; with commas one for each MoE layer",
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(task=extract)


def extract(arguments: argparse.Namespace) -> None:
    from moiie_megatron.convert.extract import extract_expert

    notes: list[str] = []
    with progress_bar("extracting") as progress:
        out = extract_expert(
            arguments.ckpt,
            arguments.expert.split(","),
            arguments.out,
            force=arguments.force,
            progress=progress,
            note=notes.append,
        )
    print_exported(out, notes)


def add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="are two models the same?  exit code 0 or 1",
        description="Compare two models, each a Hugging Face directory, a checkpoint or the output "
        "folder of a run: all tensors, bit by bit, then logits in fp32 on the CPU. A dense model "
        "equals one with experts where every expert equals the FFN. An export runs with the code "
        "in its directory.",
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--no-logits", action="store_true", help="tensors alone: any size of model")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of the largest difference of two logits"
    )
    parser.set_defaults(task=verify)


def verify(arguments: argparse.Namespace) -> None:
    check_range(arguments, "tolerance", 0)
    from moiie_megatron.convert.open_model import open_weights
    from moiie_megatron.convert.verify import compare_tensors

    a, b = open_weights(arguments.a), open_weights(arguments.b)
    print(f"A  {a.describe()}\nB  {b.describe()}", flush=True)
    with progress_bar("comparing") as progress:
        tensors = compare_tensors(a, b, progress)
    print(*tensors.lines(), sep="\n", flush=True)
    same, parts = tensors.is_equal, ["tensors"]
    if not arguments.no_logits:
        from moiie_megatron.evaluation.compare_logits import compare_logits

        differences, left_out = compare_logits(a, b)
        print(*(d.line() for d in differences), *left_out, sep="\n")
        within = all(d.maximum <= arguments.tolerance for d in differences)
        parts.append(f"logits {'within' if within else 'beyond'} {arguments.tolerance:g}")
        same &= within
    parts[0] = "tensors equal" if tensors.is_equal else f"{len(tensors.mismatches)} tensors differ"
    print(f"{'SAME' if same else 'DIFFERENT'}: {', '.join(parts)}", flush=True)
    if not same:
        raise SystemExit(1)


def add_reshard(commands: Any) -> None:
    note = (
        "Never required: every layout loads every checkpoint. What it saves is reading: no rank "
        "reads bytes that are not its own."
    )
    parser = commands.add_parser(
        "reshard",
        help="copy of a checkpoint, cut for a parallel layout (never required, less to read)",
        description=f"Write a copy of a checkpoint, cut as the ranks of a layout read it: weights, "
        f"optimizer state and all else in it. {note}",
    )
    parser.add_argument("ckpt", help="checkpoint, or output folder of a run")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallelism")
    parser.add_argument(
        "--vpp", type=int, default=1, metavar="N", help="virtual stages of each pipeline rank"
    )
    parser.add_argument(
        "--pipeline-layers", type=int, nargs="+", metavar="N", help="layers of every stage"
    )
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallelism")
    parser.add_argument(
        "--etp", type=int, default=1, metavar="N", help="tensor parallelism of the experts"
    )
    parser.add_argument("--out", required=True, metavar="CKPT2")
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    parser.set_defaults(task=reshard, note=note)


def reshard(arguments: argparse.Namespace) -> None:
    from moiie_megatron.config.schema import ParallelConfig
    from moiie_megatron.convert.reshard import reshard_checkpoint

    for name in ("tp", "pp", "vpp", "ep", "etp"):
        check_range(arguments, name, 1, MAX_DEGREE)
    for size in arguments.pipeline_layers or ():
        if not 1 <= size <= MAX_DEGREE:
            raise UserError(f"--pipeline-layers has {size}: use numbers from 1 to {MAX_DEGREE}.")
    parallel = ParallelConfig(
        tensor=arguments.tp,
        pipeline=arguments.pp,
        virtual_pipeline=arguments.vpp,
        pipeline_layers=arguments.pipeline_layers,
        expert=arguments.ep,
        expert_tensor=arguments.etp,
    )
    with progress_bar("resharding") as progress:
        out = reshard_checkpoint(
            arguments.ckpt, arguments.out, parallel, force=arguments.force, progress=progress
        )
    stages = f"PP {arguments.pp}" + (f", VPP {arguments.vpp}" if arguments.vpp > 1 else "")
    print(
        f"{out}: cut for TP {arguments.tp}, {stages}, EP {arguments.ep}, "
        f"expert TP {arguments.etp}\n{arguments.note}"
    )


def add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what is in a checkpoint")
    parser.add_argument("ckpt", help="checkpoint, or output folder of a run")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(task=inspect)


def inspect(arguments: argparse.Namespace) -> None:
    from moiie_megatron.convert.inspect_checkpoint import describe, format_description

    description = describe(arguments.ckpt)
    print(json.dumps(description) if arguments.json else format_description(description))


def _experts(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        vision, shared, number_of_text = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--experts is {text!r}: give the numbers of vision, shared and text experts as 1,2,1."
        ) from None
    return vision, shared, number_of_text


def _layers(text: str) -> str | list[int]:
    if text in ("interleaved", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--layers is {text!r}: use interleaved, all or layer numbers as 1,3,5."
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    tasks = (
        add_upcycle,
        add_export,
        add_import,
        add_extract,
        add_verify,
        add_reshard,
        add_inspect,
    )
    for add in tasks:
        add(commands)
    arguments = parser.parse_args()
    return exit_code(lambda: arguments.task(arguments), DistEnv())


if __name__ == "__main__":
    run_program(main)
