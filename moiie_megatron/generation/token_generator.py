"""From prompts to new token ids: one pass after the other until every prompt has its answer.

Shapes: b prompts, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.generation.decoding import Decoding
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.generation.sampling import GREEDY, Sampler, Sampling
from moiie_megatron.mcore.inference.stages import any_replica, from_last_stage
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.model import MoIIEModel


class TokenGenerator:
    """A model at any parallel layout.

    Every rank calls the same methods with the same prompts and gets the same result.
    Data-parallel replicas share the prompts.

    Args:
        config: The run.
        context: The process groups that ``model`` was built with.
        model: This stage of it, in evaluation mode.
        vocab_size: V; ids from here on are never chosen.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, model: MoIIEModel, vocab_size: int
    ) -> None:
        self._config, self._context, self._model = config, context, model
        self._vocab_size = vocab_size

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any lengths.

        Args:
            prompts: With the new tokens within the positions of the model.
            max_new_tokens: Longest answer.
            stop_ids: Tokens that end an answer.
            sampling: How tokens are chosen.
            numbers: Of the prompts, which with the seed determine what is drawn for each;
                default: 0, 1, ...

        Returns:
            New token ids of each prompt, without the one that ended it.
        """
        if not prompts:
            return []
        numbers = range(len(prompts)) if numbers is None else numbers
        decoding = Decoding(self._config, self._context, self._model, prompts, max_new_tokens)
        sampler = Sampler(sampling, [numbers[i] for i in decoding.own])
        answers: list[list[int]] = [[] for _ in decoding.own]
        running = [True] * len(answers)
        for _ in range(max_new_tokens):
            ids = self._next_ids(decoding, sampler)
            decoding.append(ids)
            for row, token in enumerate(ids):
                running[row] = running[row] and token not in stop_ids
                if running[row]:
                    answers[row].append(token)
            # Ranks stop together, or one would wait for another in the next pass.
            if not any_replica(any(running), self._context):
                break
        return self._of_all_replicas(answers, len(prompts), max_new_tokens)

    def next_token_logits(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores of the token after each prompt and its answer so far, ``(b, V)``.

        Prompts and answers are computed in one pass.
        """
        whole = [
            prompt.with_answer(answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        context, size = self._context, self._context.dp_size
        decoding = Decoding(self._config, context, self._model, whole, 0)
        logits = decoding.forward()
        if logits is None:
            dtype, device = self._model.config.params_dtype, context.device.torch_device
            logits = torch.empty(len(decoding.own), self._vocab_size, dtype=dtype, device=device)
        logits = from_last_stage(logits[:, : self._vocab_size].contiguous(), context)
        if size == 1:
            return logits
        most = -(-len(whole) // size)
        padded = torch.nn.functional.pad(logits, (0, 0, 0, most - len(logits)))
        gathered = padded.new_empty(size, *padded.shape)
        dist.all_gather_into_tensor(gathered, padded.unsqueeze(0), group=context.groups.dp)
        return _in_order(gathered, len(whole))

    def _next_ids(self, decoding: Decoding, sampler: Sampler) -> list[int]:
        """The next token of this replica's prompts, which its last stage chooses."""
        logits = decoding.forward()
        if logits is None:
            chosen = torch.empty(len(decoding.own), dtype=torch.int64)
            chosen = chosen.to(self._context.device.torch_device)
        else:
            chosen = sampler.choose(logits[:, : self._vocab_size])
        ids: list[int] = from_last_stage(chosen, self._context).tolist()
        return ids

    def _of_all_replicas(
        self, answers: list[list[int]], prompts: int, max_new_tokens: int
    ) -> list[list[int]]:
        """The answers to all prompts, from those of this replica."""
        if self._context.dp_size == 1:
            return answers
        rows = torch.zeros(-(-prompts // self._context.dp_size), 1 + max_new_tokens).long()
        for i, ids in enumerate(answers):
            rows[i, : 1 + len(ids)] = torch.tensor([len(ids), *ids])
        ordered = _in_order(self._context.gather_over_dp(rows), prompts)
        return [ids[1 : 1 + ids[0]] for ids in ordered.tolist()]


def _in_order(gathered: Tensor, prompts: int) -> Tensor:
    """Rows in the order of the prompts: ``(DP, most prompts of a replica, ...)`` to ``(b, ...)``.

    Replica r has the prompts r, r + DP, r + 2 DP, ...
    """
    return gathered.transpose(0, 1).flatten(0, 1)[:prompts]
