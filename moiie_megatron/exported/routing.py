"""Counts which experts an export's tokens take, as ``routing.jsonl`` of a training run has them.

Shapes: M modalities, E experts, T tokens of a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moiie_megatron.exported.routing_hooks import Choices, RoutingWatch, Step
from moiie_megatron.exported.single_expert import GROUPS
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import contiguous
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.routing_stats.load_stats import LayerSums
from moiie_megatron.routing_stats.record import routing_record
from moiie_megatron.routing_stats.version import VERSION
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output
from moiie_megatron.utils.jsonl import Records, read_records

PHASES: Final = ("prompt", "answer")


class RoutingRecorder(RoutingWatch):
    """Counts tokens by MoE layer, modality and expert while a block runs.

    Prompts and answers are counted apart; padding is not counted, nor what follows the end of an
    answer in a batch.  The last token of an answer is never read by the model, so never counted.

        with RoutingRecorder(exported.model) as recorder:
            exported.answer(conversations)
        recorder.save("routing.jsonl")

    Args:
        model: See ``RoutingWatch``.

    Raises:
        UserError: See ``RoutingWatch``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        counts = model.config.experts
        vision, shared, text = (counts[group] for group in GROUPS)
        self._layout = ExpertLayout(vision, shared, text, self.top_k)
        self._samples = 0
        size = len(MODALITIES), len(self.experts)
        self._load_PME = {
            layer: torch.zeros(len(PHASES), *size, dtype=torch.float64) for layer in self.layers
        }
        self._prob_PME = {layer: torch.zeros_like(load) for layer, load in self._load_PME.items()}

    def see(self, layer: int, step: Step, choices: Choices) -> None:
        counts_T = step.counts_BS.reshape(-1)
        is_image_T = step.is_image_BS.reshape(-1)
        masks_MT = torch.stack([counts_T & is_image_T, counts_T & ~is_image_T]).float()
        probs_TE = torch.softmax(choices.scores_TE.float(), dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, choices.experts_TK, 1.0)
        phase = int(step.is_answer)
        for sums_PME, values_TE in ((self._load_PME, chosen_TE), (self._prob_PME, probs_TE)):
            if sums_PME[layer].device != values_TE.device:
                sums_PME[layer] = sums_PME[layer].to(values_TE.device)
            sums_PME[layer][phase] += (masks_MT @ values_TE).double()
        if layer == self.layers[0] and not step.is_answer:
            self._samples += len(step.tokens_BS)

    def records(self, **about: Any) -> Records:
        """Two records of ``routing_stats/record.py``, one of prompts and one of answers.

        Each has ``phase``, ``samples`` (prompts seen) and what ``about`` says.  Nothing is sent
        between ranks, so all ``rows`` are 0.
        """
        return [
            {
                **routing_record(
                    {layer: self._sums(layer, number) for layer in self.layers},
                    self._layout,
                    contiguous(self._layout, 1),
                    row_bytes=0,
                ),
                "phase": phase,
                "samples": self._samples,
                **about,
            }
            for number, phase in enumerate(PHASES)
        ]

    def save(self, path: str | Path, **about: Any) -> None:
        """Write ``records`` as JSON Lines; an existing file is replaced.

        Raises:
            UserError: It cannot be written.
        """
        lines = "".join(json.dumps(record) + "\n" for record in self.records(**about))
        with write_output(path) as file:
            file.write_text(lines, encoding="utf-8")

    def add_saved(self, path: str | Path) -> None:
        """Go on from the counts of a file that ``save`` wrote for the same model.

        Raises:
            UserError: It cannot be read, or has counts of another model.
        """
        records = read_records(path)
        for record in records:
            if not self._is_ours(record):
                raise UserError(
                    f"{path} holds other counts than of this model's experts: delete it or name "
                    "another file."
                )
        for record in records:
            phase = PHASES.index(record["phase"])
            self._samples += record["samples"] if phase == 0 else 0
            for layer in self.layers:
                for m, modality in enumerate(MODALITIES):
                    part = record["layers"][str(layer)][modality]
                    load_E = _row(part["load"], self._load_PME[layer])
                    prob_E = _row(part["prob"], self._prob_PME[layer]) * part["tokens"]
                    self._load_PME[layer][phase, m] += load_E
                    self._prob_PME[layer][phase, m] += prob_E

    def _is_ours(self, record: dict[str, Any]) -> bool:
        layers = [str(layer) for layer in self.layers]
        return (
            record.get("version") == VERSION
            and record.get("phase") in PHASES
            and record.get("experts") == self.experts
            and [*record.get("layers", ())] == layers
        )

    def _sums(self, layer: int, phase: int) -> LayerSums:
        load_ME = self._load_PME[layer][phase].round().long()
        nothing = [0] * (len(MODALITIES) + 1)
        return LayerSums(
            tokens_M=(load_ME.sum(dim=1) // self.top_k).tolist(),
            load_ME=load_ME.tolist(),
            prob_ME=self._prob_PME[layer][phase].tolist(),
            rows_A=nothing,
            remote_A=nothing,
        )


def _row(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)
