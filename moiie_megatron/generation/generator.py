"""Answers of a model in a checkpoint.

Shapes: b prompts, m images of one prompt, S pixels per side, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoder import encode_prompt
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.encode.stop_ids import stop_ids
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Turn
from moiie_megatron.families.registry import vision_family
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.generation.sampling import GREEDY, Sampling
from moiie_megatron.generation.token_generator import TokenGenerator
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.model import MoIIEModel


class Generator:
    """A model, and the tokenizer, template and image processing of its training.

    Every rank calls the same methods with the same prompts and gets the same answers.
    Data-parallel replicas share the prompts.

    Args:
        config: ``data.tokenizer`` and ``stage.template`` define the format of prompts.
        context: The process groups that ``model`` was built with.
        model: Put into evaluation mode here.

    Raises:
        UserError: The template does not fit the tokenizer.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, model: MoIIEModel) -> None:
        self.config = config
        self.context = context
        self.model = model.eval()
        self.tokenizer = load_tokenizer(
            config.data.tokenizer, config.data.image_token, config.data.markers_in_text
        )
        self.template = load_template(config.stage.template, self.tokenizer)
        self.statistics = vision_family(config.vision.family).statistics
        self.stop_ids = stop_ids(self.tokenizer, self.template, config.data.tokenizer)
        # Embedding rows beyond the vocabulary pad the matrix; they are no tokens.
        self._tokens = TokenGenerator(config, context, self.model, self.tokenizer.vocab_size)

    @classmethod
    def load(cls, directory: Path, config: RunConfig, context: ParallelContext) -> Generator:
        """Build the model of ``config`` and read its weights from the checkpoint ``directory``.

        Raises:
            UserError: See the constructor, ``build_model`` and ``load_weights``.
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
        """Check that there is a prompt, and that the answer has positions behind it.

        Raises:
            UserError: No token, or prompt and answer could exceed the model's positions.
        """
        length, limit = len(prompt.tokens), self.config.language.max_position_embeddings
        if not length:
            raise UserError(
                f"The prompt has no token: stage.template {self.config.stage.template} writes "
                "nothing of it, give it an image or use a model with a format for questions."
            )
        if length + max_new_tokens > limit:
            raise UserError(
                f"A prompt of {length} tokens with {max_new_tokens} new ones exceeds "
                f"language.max_position_embeddings {limit}: shorten the prompt or the answer."
            )

    def blanked(self, prompt: Prompt) -> Prompt:
        """The same prompt with every pixel set to the encoder's mean colour."""
        colour = torch.tensor(self.statistics.mean).mul(255).round().byte().view(1, 3, 1, 1)
        return replace(prompt, images=colour.expand_as(prompt.images))

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The answers as text, without markers.  Raises what ``generate`` raises."""
        return [self.text(ids) for ids in self.generate(prompts, max_new_tokens, sampling)]

    def text(self, ids: Sequence[int]) -> str:
        """An answer as text, without markers."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any lengths up to a stop token.

        Args:
            prompts: They share passes; how many fit depends on the memory of the device.
            max_new_tokens: Longest answer.
            sampling: How tokens are chosen.
            numbers: See ``TokenGenerator.generate``.

        Returns:
            New token ids of each prompt, without the stop token.

        Raises:
            UserError: See ``check_length``.
        """
        for prompt in prompts:
            self.check_length(prompt, max_new_tokens)
        return self._tokens.generate(
            prompts, max_new_tokens, stop_ids=self.stop_ids, sampling=sampling, numbers=numbers
        )

    def next_token_logits(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """See ``TokenGenerator.next_token_logits``."""
        return self._tokens.next_token_logits(prompts, answers)
