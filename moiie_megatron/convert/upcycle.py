"""Upcycling offline: a Hugging Face language model and vision encoder -> a Megatron checkpoint.

Every expert of a layer is a copy of the dense FFN of that layer, routers are fresh (paper,
section 3).  The table is the one that training uses to upcycle while it loads
(``checkpoint/load_weights.py``), and so are the fresh routers: both ways give the same weights.
Tensor by tensor, one at a time; no GPU, no process group, no Megatron.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.checkpoint.directory import (
    CONFIG_FILE,
    FORMAT_VERSION,
    PROCESSOR_FILES,
    check_output,
    copy_tokenizer,
    new_directory,
)
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import LanguageConfig, MoEConfig, RunConfig
from moiie_megatron.convert.conversion_report import ConversionReport
from moiie_megatron.convert.dcp.writer import CheckpointWriter
from moiie_megatron.convert.default_run_config import run_from_checkpoint
from moiie_megatron.convert.expert_noise import with_noise
from moiie_megatron.convert.hf.config import (
    read_language_config,
    read_moe_config,
    read_vision_config,
)
from moiie_megatron.convert.hf.reader import (
    HfReader,
    connector_reader,
    language_reader,
    vision_reader,
)
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.families import weight_map
from moiie_megatron.families.registry import language_family
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.layout.experts import Variant, moe_layers
from moiie_megatron.moe.router_init import fresh_gate
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.connector import Connector

MARKER = "metadata.json"  # by which a checkpoint is recognised before it is replaced

Progress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class UpcycleOptions:
    """What the experts of the new model are.

    Args:
        variant: Which of the four systems.
        experts: (vision, shared, text); None for the variant's four-expert default.
        layers: Which layers get experts, as ``moe.layers``.
        top_k: Experts per token.
        perturb: Noise on every copy, relative to the root mean square of the tensor.
        seed: Of fresh routers, a fresh connector and the noise.
    """

    variant: Variant = "moiie"
    experts: tuple[int, int, int] | None = None
    layers: str | list[int] = "interleaved"
    top_k: int = 2
    perturb: float = 0.0
    seed: int = 1234

    def moe(self) -> MoEConfig:
        """The run's ``moe`` section.

        Raises:
            UserError: Numbers that do not fit the variant.
        """
        vision, shared, text = self.experts or (None, None, None)
        section = MoEConfig(
            variant=self.variant,
            num_vision_experts=vision,
            num_shared_experts=shared,
            num_text_experts=text,
            layers=self.layers,
            top_k=self.top_k,
        )
        layout = section.layout
        return section.model_copy(
            update={
                "num_vision_experts": layout.num_vision,
                "num_shared_experts": layout.num_shared,
                "num_text_experts": layout.num_text,
            }
        )


def upcycle_checkpoint(
    llm: str | Path,
    vision: str | Path,
    out: str | Path,
    options: UpcycleOptions | None = None,
    *,
    connector: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint that training can start from and that can be exported.

    Weights keep their dtype; training casts them to its own.

    Args:
        llm: Hugging Face directory of a language model, with its tokenizer.  Experts
            that it has are taken as they are (Vanilla MoE).
        vision: Hugging Face directory of a vision encoder, or one that holds it.
        connector: Safetensors file with a trained connector; a fresh one otherwise.
        force: Replace an earlier checkpoint at ``out``.
        progress: Told about every tensor written.

    Returns:
        ``out``.

    Raises:
        UserError: Sources, options or output that cannot be used, said before anything is
            written; or a source that turns out to be unreadable.
    """
    options, llm, vision, out = options or UpcycleOptions(), Path(llm), Path(vision), Path(out)
    check_output(out, force=force, ours=MARKER)
    if options.perturb < 0:
        raise UserError(f"perturb is {options.perturb}: use 0 or more.")
    sources = _open(llm, vision, connector, options)
    config = run_from_checkpoint(
        out,
        language=sources.language,
        vision=read_vision_config(vision),
        connector_size=sources.connector_size,
        moe=sources.moe,
        template=template_of(llm, sources.language),
        dtype=sources.dtype,
        seed=options.seed,
    )
    pieces = _plan(config, sources)
    operation = {
        "operation": "upcycle",
        "llm": str(llm),
        "vision": str(vision),
        "connector": None if connector is None else str(connector),
        "options": asdict(options),
    }
    total = sum(piece.info.num_bytes for piece in pieces)
    with (
        new_directory(out, num_bytes=total, force=force, ours=MARKER) as folder,
        ConversionReport(operation, sources.files) as receipt,
        CheckpointWriter(folder) as writer,
    ):
        done = 0
        for piece in pieces:
            _write(piece, config, options.perturb, writer, receipt)
            done += piece.info.num_bytes
            if progress is not None:
                progress(done, total)
        (folder / CONFIG_FILE).write_text(dump_config(config))
        copy_tokenizer(llm, folder)
        for name in PROCESSOR_FILES:
            if (vision / name).is_file():
                shutil.copy(vision / name, folder / name)
        receipt.write(folder)
        writer.finish(common_state(options.seed))
    return out


@dataclass(frozen=True)
class _Sources:
    """What a checkpoint is made from: a reader per part; a part without one starts fresh."""

    language: LanguageConfig
    moe: MoEConfig
    readers: dict[str, HfReader]

    def info(self, name: str, expert: int | None) -> TensorInfo | None:
        reader = self._reader(name)
        return None if reader is None else reader.info(name, expert)

    def get(self, name: str, expert: int | None) -> Tensor | None:
        reader = self._reader(name)
        return None if reader is None else reader.get(name, expert)

    def _reader(self, name: str) -> HfReader | None:
        return next((r for prefix, r in self.readers.items() if name.startswith(prefix)), None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model; fresh weights get it, too."""
        info = self.info(weight_map.EMBEDDING, None)
        assert info is not None
        return info.dtype

    @property
    def connector_size(self) -> int | None:
        info = self.info(f"{weight_map.CONNECTOR}linear_1.weight", None)
        return None if info is None else info.shape[0]

    @property
    def files(self) -> list[Path]:
        return sorted({file for reader in self.readers.values() for file in reader.source.files})


def _open(
    llm: Path, vision: Path, connector: str | Path | None, options: UpcycleOptions
) -> _Sources:
    language, moe = read_language_config(llm), options.moe()
    pretrained = read_moe_config(llm)
    if pretrained is not None:
        if options.variant != "vanilla" or options.experts not in (None, _groups(pretrained)):
            raise UserError(
                f"{llm} has {pretrained.num_shared_experts} experts in every layer: use the "
                "variant vanilla and leave the numbers of experts out."
            )
        moe = pretrained
    reader = language_reader(language, moe.layout, moe_layers(moe.layers, language.num_layers), llm)
    if pretrained is None and any(".experts." in name for name in reader.source.names):
        raise UserError(f"{llm} already has experts: give a dense model.")
    readers = {weight_map.VISION: vision_reader(read_vision_config(vision), vision)}
    readers[weight_map.CONNECTOR] = reader if connector is None else connector_reader(connector)
    readers[weight_map.LANGUAGE] = reader
    return _Sources(language, moe, readers)


def _groups(moe: MoEConfig) -> tuple[int, int, int]:
    return (moe.layout.num_vision, moe.layout.num_shared, moe.layout.num_text)


def template_of(llm: Path, language: LanguageConfig) -> str:
    """``stage.template``: the tokenizer's own where it has one."""
    if load_tokenizer(llm).chat_template is not None:
        return "tokenizer"
    return language_family(language.family).default_template


@dataclass(frozen=True)
class _Piece:
    """A tensor that is going to be written; of experts one expert's part."""

    row: WeightMapping
    info: TensorInfo
    read: Callable[[], Tensor]


def _plan(config: RunConfig, sources: _Sources) -> list[_Piece]:
    """Everything, in an order in which experts that share a tensor follow each other."""
    rows = weight_map.model_rows(config)
    by_name: dict[str, list[WeightMapping]] = {}
    for row in rows:
        by_name.setdefault(row.megatron, []).append(row)
    new_connector = fresh_connector(config)
    pieces = []
    for row in (row for group in by_name.values() for row in group):
        name, shape = row.megatron, row.full_shape
        info = sources.info(name, row.expert)
        read: Callable[[], Tensor | None]
        if info is not None:
            read = partial(sources.get, name, row.expert)
        elif weight_map.ROUTER in name:
            read = partial(_fresh_router, config, row, sources.dtype)
        else:
            fresh = new_connector[name.removeprefix(weight_map.CONNECTOR)].to(sources.dtype)
            read = partial(torch.clone, fresh)
        info = info or TensorInfo(shape, sources.dtype)
        if info.shape != shape:
            raise UserError(
                f"{name} has shape {info.shape} in the source but its config.json means {shape}: "
                "use the weights that belong to it."
            )
        pieces.append(_Piece(row, info, read))
    return pieces


def _fresh_router(config: RunConfig, row: WeightMapping, dtype: torch.dtype) -> Tensor:
    assert row.layer is not None
    return fresh_gate(
        row.full_shape,
        seed=config.train.seed,
        layer_number=row.layer + 1,
        router=config.moe.layout.routers.index(row.megatron.rpartition(".")[2]),
        std=config.moe.router_init_std,
    ).to(dtype)


def fresh_connector(config: RunConfig) -> dict[str, Tensor]:
    """PyTorch's initialisation of linear layers, as in training."""
    hidden = config.language.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        inner = config.connector.hidden_size or hidden
        return Connector(config.vision.hidden_size, inner, hidden).state_dict()


def _write(
    piece: _Piece,
    config: RunConfig,
    perturb: float,
    writer: CheckpointWriter,
    receipt: ConversionReport,
) -> None:
    name, expert, tensor = piece.row.megatron, piece.row.expert, piece.read()
    if expert is None:
        add = receipt.add_router if weight_map.ROUTER in name else receipt.add
        add(name, tensor, writer.write(name, tensor))
        return
    layout, layer, dense = config.moe.layout, piece.row.layer, tensor
    assert layer is not None
    if perturb:
        part = int(name.endswith("linear_fc2.weight"))
        tensor = with_noise(
            tensor, perturb, seed=config.train.seed, layer=layer, expert=expert, part=part
        )
    receipt.add_expert(
        name,
        tensor,
        writer.write_expert(name, tensor, expert, layout.num_experts),
        layer=layer,
        expert=layout.name(expert),
        dense=None if language_family(config.language.family).has_experts else dense,
    )


def common_state(seed: int) -> dict[str, Any]:
    """The common state of a checkpoint in which no step has been taken (``store.py``)."""
    return {
        "format_version": FORMAT_VERSION,
        "world_size": 1,
        "progress": {"step": 0, "consumed_samples": 0, "num_samples": 0, "seed": seed},
    }
