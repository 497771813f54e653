"""Greedy generation with the training model, directly from a checkpoint.

Meant for short answers: there is no key-value cache, so each new token is computed from the whole
prefix and its images.  The exported Hugging Face model has a cache; use it for serving.

Shapes: b prompts, s tokens of the longest prefix, m images of one prompt, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoder import encode_prompt
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.encode.stop_ids import stop_ids
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Turn
from moiie_megatron.families.registry import vision_family
from moiie_megatron.layout.token_types import PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.image_split import pixels_of_rank
from moiie_megatron.vlm.model import MoIIEModel


@dataclass(frozen=True)
class Prompt:
    """The encoded input that the model continues.

    Attributes:
        tokens: int64 ``(n,)``.
        token_types: int8 ``(n,)``.
        images: uint8 ``(m, 3, S, S)``, in the order of their runs of image tokens.
    """

    tokens: Tensor
    token_types: Tensor
    images: Tensor


_OF_TRAINING: Final = ("parallel={}", "megatron={}", "ddp={}", "optimizer.megatron={}")


def checkpoint_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration stored in a checkpoint, with the checkpoint's own tokenizer.

    All parallel degrees are 1 unless ``overrides`` set them (``parallel.expert=2``), whatever the
    degrees of the run that wrote the checkpoint.  What that run has set of Megatron-Core's fields
    concerns training, or kernels that this machine may not have, and is left out.

    Raises:
        UserError: The configuration is broken, or an override is wrong.
    """
    config = load_saved_config(directory / CONFIG_FILE, [*_OF_TRAINING, *overrides])
    return config.model_copy(
        update={"data": config.data.model_copy(update={"tokenizer": str(directory)})}
    )


class Generator:
    """A model, and the tokenizer, template and image processing of its training.

    Every rank calls the same methods with the same prompts and gets the same answers.  Pipeline
    parallelism is not supported.

    Args:
        config: ``data.tokenizer`` and ``stage.template`` define the format of prompts.
        context: The process groups that ``model`` was built with.
        model: Put into evaluation mode here.

    Raises:
        UserError: Pipeline parallelism, or the template does not fit the tokenizer.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, model: MoIIEModel) -> None:
        if config.parallel.pipeline != 1:
            raise UserError(
                f"parallel.pipeline is {config.parallel.pipeline}: generation needs 1, split the "
                "model with parallel.tensor or parallel.expert."
            )
        self.config = config
        self.context = context
        self.model = model.eval()
        self.tokenizer = load_tokenizer(
            config.data.tokenizer, config.data.image_token, config.data.markers_in_text
        )
        self.template = load_template(config.stage.template, self.tokenizer)
        self.statistics = vision_family(config.vision.family).statistics
        self.stop_ids = stop_ids(self.tokenizer, self.template, config.data.tokenizer)

    @classmethod
    def load(cls, directory: Path, config: RunConfig, context: ParallelContext) -> Generator:
        """Build the model of ``config`` and read its weights from the checkpoint ``directory``.

        Raises:
            UserError: See the constructor and ``load_weights``.
        """
        model = build_model(config, context)
        load_weights(directory, context, model)
        return cls(config, context, model)

    def image_loader(self, root: str | Path) -> ImageLoader:
        """A loader of images below ``root`` that processes them as in training."""
        return ImageLoader(
            root,
            self.config.vision.image_size,
            self.config.stage.image_mode,
            self.statistics.mean,
            allow_outside=self.config.data.allow_outside_images,
        )

    def prompt(self, turns: Sequence[Turn], images: Sequence[Tensor]) -> Prompt:
        """Encode a conversation that ends with a user turn.

        Args:
            images: uint8 ``(3, S, S)`` each, one per ``<image>`` in the turns.

        Raises:
            UserError: Another number of images than of placeholders, or the template cannot
                express the conversation.
        """
        placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        if placeholders != len(images):
            raise UserError(
                f"The prompt has {placeholders} {PLACEHOLDER} placeholders but {len(images)} "
                "images: give one placeholder per image."
            )
        tokens, types = encode_prompt(
            turns, self.tokenizer, self.template, self.config.vision.num_image_tokens
        )
        side = self.config.vision.image_size
        pixels = torch.stack(list(images)) if images else torch.empty(0, 3, side, side).byte()
        return Prompt(tokens, types, pixels)

    def check_length(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Check that the answer has positions behind the prompt.

        Raises:
            UserError: Prompt and answer could exceed the model's positions.
        """
        length, limit = len(prompt.tokens), self.config.language.max_position_embeddings
        if length + max_new_tokens > limit:
            raise UserError(
                f"A prompt of {length} tokens with {max_new_tokens} new ones exceeds "
                f"language.max_position_embeddings {limit}: shorten the prompt or the answer."
            )

    def blanked(self, prompt: Prompt) -> Prompt:
        """The same prompt with every pixel set to the encoder's mean colour."""
        colour = torch.tensor(self.statistics.mean).mul(255).round().byte().view(1, 3, 1, 1)
        return replace(prompt, images=colour.expand_as(prompt.images))

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 64) -> list[str]:
        """The answers as text, without markers.  Raises what ``generate`` raises."""
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in self.generate(prompts, max_new_tokens)
        ]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int = 64) -> list[list[int]]:
        """Continue prompts of any lengths with the most likely token, up to a stop token.

        Returns:
            New token ids of each prompt, without the stop token.

        Raises:
            UserError: Prompt and answer could exceed the model's positions.
        """
        if not prompts:
            return []
        for prompt in prompts:
            self.check_length(prompt, max_new_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        for _ in range(max_new_tokens):
            for row, token in enumerate(self._next_tokens(prompts, answers)):
                running[row] = running[row] and token not in self.stop_ids
                if running[row]:
                    answers[row].append(token)
            if not any(running):
                break
        return answers

    def next_token_logits(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores of the token after each prompt and its answer so far, ``(b, vocabulary)``.

        Rows are padded at the right: attention is causal and experts see tokens one by one, so
        padding changes nothing before it.
        """
        tokens, types, lengths = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            new = torch.tensor(list(answer), dtype=torch.int64)
            tokens.append(torch.cat([prompt.tokens, new]))
            types.append(
                torch.cat([prompt.token_types, torch.full(new.shape, TEXT).to(torch.int8)])
            )
            lengths.append(len(tokens[-1]))
        device = self.context.device.torch_device
        images = torch.cat([prompt.images for prompt in prompts])
        logits = self.model(
            tokens=self._padded(tokens, self.tokenizer.pad_id).to(device),
            position_ids=torch.arange(self._width(max(lengths)), device=device).repeat(
                len(prompts), 1
            ),
            token_types=self._padded(types, PADDING).to(device),
            images=pixels_of_rank(images, self.config.vision, self.context),
        )
        rows = torch.arange(len(prompts), device=device)
        last = logits[rows, torch.tensor(lengths, device=device) - 1]
        # Embedding rows beyond the vocabulary pad the matrix; they are no tokens.
        return last[:, : self.tokenizer.vocab_size]

    def _next_tokens(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
    ) -> list[int]:
        chosen = self.next_token_logits(prompts, answers).argmax(dim=-1)
        # Ranks must agree on when to stop, or one would wait for another in the next forward
        # pass: rounding may differ between them.
        dist.broadcast(chosen, src=0)
        ids: list[int] = chosen.tolist()
        return ids

    def _width(self, longest: int) -> int:
        """Sequence parallelism cuts into equal parts."""
        parallel = self.config.parallel
        parts = parallel.tensor if parallel.sequence_parallel else 1
        return -(-longest // parts) * parts

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        stacked = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = self._width(stacked.shape[1]) - stacked.shape[1]
        return torch.nn.functional.pad(stacked, (0, missing), value=value)
