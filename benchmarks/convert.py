"""Conversion speed against ``cp`` of the same bytes on the same disk, and peak memory.

``convert.py --layers 32 --hidden 4096 --ffn 14336 --heads 32 --groups 8 --vocab 128256 --rounds 1``
is Llama-3-8B (16 GB in, 33 GB out; needs 70 GB of disk).  Random weights in Hugging Face format
are upcycled and exported, each in a process of its own; seconds count from the call to its
return, without Python's start.

``cp`` reads and writes as many bytes as the conversion before it writes; upcycling reads fewer,
because experts share a dense FFN.  Nobody calls fsync: where the sources fit into memory, both
``cp`` and the conversions copy from and into the page cache, and a disk that is slower than that
makes them more alike.  Before every clock the disk is synced, and as much memory as the step
fills is taken once and given back: a virtual machine gets memory from its host more slowly than
any of them copies, and whoever comes first would pay for it.

``..._cpu`` compares processor seconds: of more use than time on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {"layers": 8, "hidden": 2048, "ffn": 7168, "heads": 16, "groups": 8, "vocab": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary one")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder = arguments.step
        print(json.dumps(run_step(step, Path(folder), arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(Path(folder), arguments.rounds)
    report = summary(results)
    for key, value in report.items():
        print(f"{key:<16} {value:.3g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report) + "\n")


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Every round: upcycle, cp of the checkpoint, export, cp of the export.

    What is not needed any more goes at once: three copies of the model would not fit most disks.
    """
    start("generate", folder)
    checkpoint, exported, copy = folder / "checkpoint", folder / "exported", folder / "copy"
    results = []
    for number in range(rounds):
        result = {"upcycle": start("upcycle", folder)}
        if number == rounds - 1:
            shutil.rmtree(folder / "llm")
        result["cp_checkpoint"] = timed_copy(checkpoint, copy)
        result["export"] = start("export", folder)
        shutil.rmtree(checkpoint)
        result["cp_exported"] = timed_copy(exported, copy)
        shutil.rmtree(exported)
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)
    return results


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of ratios within a round."""
    pairs = {
        "upcycle_over_cp": ("upcycle", "cp_checkpoint"),
        "export_over_cp": ("export", "cp_exported"),
    }
    report = {
        "peak_rss_gb": max(
            r[step]["peak_rss_gb"] for r in results for step in ("upcycle", "export")
        )
    }
    for suffix, key in (("", "seconds"), ("_cpu", "cpu_seconds")):
        for name, (step, peer) in pairs.items():
            ratios = [r[peer][key] / r[step][key] for r in results]
            report[name + suffix] = statistics.median(ratios)
    report["gb_written"] = results[0]["cp_checkpoint"]["gb"]
    return report


def start(step: str, folder: Path) -> dict[str, Any]:
    """Run a step in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--step", step, str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def timed_copy(source: Path, target: Path) -> dict[str, float]:
    settle(size(source))
    begin, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - begin
    cpu = cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    count = size(target)
    shutil.rmtree(target)
    return {"seconds": seconds, "cpu_seconds": cpu, "gb": count / 1e9}


def settle(num_bytes: int) -> None:
    """Nothing is left to write from before, and so much free memory is at hand."""
    os.sync()
    code = "import mmap, sys; memory = mmap.mmap(-1, int(sys.argv[1])); memory.madvise(23)"
    # 23 is MADV_POPULATE_WRITE (Linux 5.14), for which Python has no name.
    subprocess.run([sys.executable, "-c", code, str(num_bytes)], check=False)


def cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def run_step(step: str, folder: Path, sizes: argparse.Namespace) -> dict[str, float]:
    """In the process of the step: imports first, then the clock."""
    # transformers imports its modules when a class is first asked for.
    from transformers import AutoModelForImageTextToText, LlamaConfig, SiglipVisionConfig  # noqa: F401

    from moiie_megatron.convert.export import export_checkpoint
    from moiie_megatron.convert.upcycle import upcycle_checkpoint

    if step == "generate":
        generate(folder, sizes)
        return {}
    # Upcycling to four experts in every second layer makes twice as many bytes.
    settle(2 * size(folder / "llm") if step == "upcycle" else size(folder / "checkpoint"))
    begin, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
    if step == "upcycle":
        upcycle_checkpoint(folder / "llm", folder / "vision", folder / "checkpoint")
    else:
        export_checkpoint(folder / "checkpoint", folder / "exported")
    seconds, cpu = time.perf_counter() - begin, cpu_seconds(resource.RUSAGE_SELF) - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_gb": peak * 1024 / 1e9}


def generate(folder: Path, sizes: argparse.Namespace) -> None:
    """A Llama with random weights and a tokenizer, and a small SigLIP, tensor by tensor."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from moiie_megatron.config.schema import LanguageConfig, VisionConfig
    from moiie_megatron.convert.hf.safetensors_writer import SafetensorsWriter
    from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
    from moiie_megatron.families.transforms import TensorInfo
    from moiie_megatron.families.weight_map import language_rows, vision_rows
    from moiie_megatron.layout.experts import ExpertLayout

    language = LanguageConfig(
        family="llama",
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.groups,
        vocab_size=sizes.vocab,
        max_position_embeddings=8192,
    )
    vision = VisionConfig(
        family="siglip",
        hidden_size=64,
        ffn_hidden_size=128,
        num_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        activation="gelu_pytorch_tanh",
    )
    parts = {
        "llm": language_rows(language, ExpertLayout(0, 0, 0), []),
        "vision": vision_rows(vision),
    }
    for name, rows in parts.items():
        (folder / name).mkdir()
        tensors = []
        for row in rows:
            made = row.transform.to_hf(TensorInfo(row.full_shape, torch.bfloat16).meta())
            tensors += [(hf, TensorInfo.of(part)) for hf, part in zip(row.hf, made, strict=True)]
        with SafetensorsWriter(folder / name, tensors) as writer:
            for hf, info in tensors:
                writer.write(hf, torch.empty(info.shape, dtype=info.dtype).normal_(std=0.02))
            writer.finish()
    language_to_hf(language, {"bos_token_id": 0, "eos_token_id": 1}).save_pretrained(folder / "llm")
    vision_to_hf(vision).save_pretrained(folder / "vision")
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "<image>"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "llm")


if __name__ == "__main__":
    main()
