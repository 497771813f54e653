"""Upcycling offline: a Hugging Face language model and vision encoder -> a Megatron checkpoint.

Every expert of a layer is a copy of the dense FFN of that layer, routers are fresh (paper,
section 3).  The table is the one that training uses to upcycle while it loads
(``checkpoint/load_weights.py``), and so are the fresh routers: both ways give the same weights.
Tensor by tensor, one at a time; no GPU, no process group, no Megatron.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from moiie_megatron.checkpoint.directory import PROCESSOR_FILES, copy_tokenizer
from moiie_megatron.config.messages import first_problem
from moiie_megatron.config.schema import LanguageConfig, MoEConfig, RunConfig
from moiie_megatron.convert.checkpoint_output import (
    MARKER,
    CheckpointOutput,
    checkpoint_output,
    initial_state,
)
from moiie_megatron.convert.conversion_report import ConversionReport
from moiie_megatron.convert.default_run_config import run_from_checkpoint, template_of
from moiie_megatron.convert.fresh_weights import fresh_connector, fresh_router, with_noise
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
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families import weight_map
from moiie_megatron.families.registry import language_family
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.layout.experts import Variant, moe_layers
from moiie_megatron.utils.directories import check_output
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import NoteFn, ProgressFn


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
        try:
            section = MoEConfig(
                variant=self.variant,
                num_vision_experts=vision,
                num_shared_experts=shared,
                num_text_experts=text,
                layers=self.layers,  # type: ignore[arg-type]  # checked by MoEConfig
                top_k=self.top_k,
            )
        except ValidationError as error:
            raise UserError(f"moe.{first_problem(error, MoEConfig)}") from None
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
    progress: ProgressFn | None = None,
    note: NoteFn | None = None,
) -> Path:
    """Write a checkpoint that training can start from and that can be exported.

    Weights keep their dtype; training casts them to its own.

    Args:
        llm: Hugging Face directory of a language model, with its tokenizer.  Experts
            that it has are taken as they are (Vanilla MoE).
        vision: Hugging Face directory of a vision encoder, or one that holds it.
        connector: File (safetensors or ``.bin``) or directory with a trained connector; a fresh
            one otherwise.
        force: Replace an earlier checkpoint at ``out``.
        progress: Told about every tensor written.
        note: Told why ``stage.template`` is not the tokenizer's own template.

    Returns:
        ``out``.

    Raises:
        UserError: Sources, options or output that cannot be used, said before anything is
            written; or a source that turns out to be unreadable.
    """
    options, llm, vision, out = options or UpcycleOptions(), Path(llm), Path(vision), Path(out)
    check_output(out, force=force, marker=MARKER)
    if not (math.isfinite(options.perturb) and options.perturb >= 0):
        raise UserError(f"perturb is {options.perturb}: use a finite number of at least 0.")
    sources = _open(llm, vision, connector, options)
    template, reason = template_of(llm, sources.language)
    if reason and note:
        note(reason)
    config = run_from_checkpoint(
        out,
        language=sources.language,
        vision=read_vision_config(vision),
        connector_size=sources.connector_size,
        moe=sources.moe,
        template=template,
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
    with checkpoint_output(
        out,
        num_bytes=sum(piece.info.num_bytes for piece in pieces),
        force=force,
        progress=progress,
        report=ConversionReport(operation, sources.files),
    ) as output:
        for piece in pieces:
            _write(piece, config, options.perturb, output)
        copy_tokenizer(llm, output.directory)
        for name in PROCESSOR_FILES:
            if (vision / name).is_file():
                shutil.copy(vision / name, output.directory / name)
        output.finish(config, initial_state(options.seed))
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

    def get_bytes(self, name: str, expert: int | None) -> TensorBytes:
        reader = self._reader(name)
        data = None if reader is None else reader.get_bytes(name, expert)
        assert data is not None, name  # `info` was asked first
        return data

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


@dataclass(frozen=True)
class _Piece:
    """A tensor that is going to be written; of experts one expert's part."""

    row: WeightMapping
    info: TensorInfo
    read: Callable[[], TensorBytes]


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
        read: Callable[[], TensorBytes]
        if info is not None:
            read = partial(sources.get_bytes, name, row.expert)
        elif weight_map.ROUTER in name:
            read = partial(TensorBytes.of, fresh_router(config, row, sources.dtype))
        else:
            fresh = new_connector[name.removeprefix(weight_map.CONNECTOR)].to(sources.dtype)
            read = partial(TensorBytes.of, fresh)
        info = info or TensorInfo(shape, sources.dtype)
        if info.shape != shape:
            raise UserError(
                f"{name} has shape {info.shape} in the source but its config.json means {shape}: "
                "use the weights that belong to it."
            )
        pieces.append(_Piece(row, info, read))
    return pieces


def _write(piece: _Piece, config: RunConfig, perturb: float, output: CheckpointOutput) -> None:
    row, data, dense = piece.row, piece.read(), None
    if row.expert is not None:
        assert row.layer is not None
        if not language_family(config.language.family).has_experts:
            dense = data
        if perturb:
            noisy = with_noise(
                data.tensor(),
                perturb,
                seed=config.train.seed,
                layer=row.layer,
                expert=row.expert,
                part=int(row.megatron.endswith("linear_fc2.weight")),
            )
            if not noisy.isfinite().all():
                raise UserError(
                    f"perturb is {perturb}: with this noise values of {row.megatron} are not "
                    "finite, use a smaller one."
                )
            data = TensorBytes.of(noisy)
    output.write(row, data, config.moe.layout, dense)
