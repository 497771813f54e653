"""An exported model that answers conversations: one at a time, in batches, or as a stream.

Shapes: B prompts, S tokens of the longest, n images of one prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from moiie_megatron.exported.conversation import Message, checked
from moiie_megatron.exported.generation_settings import generation_settings
from moiie_megatron.exported.load import check_export, chosen_device, load_model, load_processor
from moiie_megatron.exported.single_expert import use_expert
from moiie_megatron.utils.errors import UserError

Prompt = Mapping[str, Tensor]
"""``input_ids`` and ``mm_token_type_ids`` ``(1, S)``, ``pixel_values`` ``(n, 3, side, side)`` if
there are images: what ``encode`` makes of a conversation."""


class ExportedModel:
    """A model and its processor, both from an exported directory.

    Calls do not overlap: another thread waits until the call before it has ended.

    Args:
        model: In evaluation mode.
        processor: Of the same directory.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self._one_at_a_time = threading.Lock()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        expert: str | None = None,
    ) -> ExportedModel:
        """Load an export, whose own code is run.

        Args:
            directory: Written by ``tools/convert.py export``.
            device: ``auto`` for the first GPU, or the CPU without one; or as in torch.
            dtype: ``auto`` for that of the files, ``float32``, ``bfloat16`` or ``float16``.
            expert: In every MoE layer use this one alone (``single_expert.use_expert``).

        Raises:
            UserError: No export or a damaged one, a transformers that its code does not run with,
                an unknown device or dtype, or an expert that the model does not have.
        """
        folder = check_export(directory)
        where = chosen_device(device)
        processor = load_processor(folder)
        model = load_model(folder, where, dtype)
        if expert is not None:
            use_expert(model, expert)
        return cls(model, processor)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def encode(
        self,
        conversation: Sequence[Message],
        *,
        images: Sequence[Any] = (),
        max_new_tokens: int = 64,
    ) -> Prompt:
        """The input of the model for one conversation, with the start of its answer.

        Args:
            conversation: Ends with a message of the user.
            images: Pictures for image tokens that stand in the texts, instead of parts of type
                ``image``.
            max_new_tokens: What the answer needs room for.

        Raises:
            UserError: See ``conversation.checked``; other numbers of pictures and of image tokens,
                a conversation that the chat template refuses, or one that is too long.
        """
        messages, pictures = checked(conversation, images)
        text = self._template(messages)
        placeholders = text.count(self.processor.image_token)
        if placeholders != len(pictures):
            raise UserError(
                f"The conversation has {len(pictures)} pictures and {self.processor.image_token} "
                f"{placeholders} times: give as many pictures as places for them."
            )
        prompt = self.processor(
            text=[text], images=pictures or None, add_special_tokens=False, return_tensors="pt"
        )
        length = prompt["input_ids"].shape[1]
        limit = self.model.config.get_text_config().max_position_embeddings
        if not length:
            raise UserError("The conversation has no token: write a question.")
        if length + max_new_tokens > limit:
            raise UserError(
                f"A prompt of {length} tokens with {max_new_tokens} new ones exceeds the model's "
                f"{limit} positions: shorten the prompt or the answer."
            )
        return {
            key: prompt[key]
            for key in ("input_ids", "mm_token_type_ids", "pixel_values")
            if prompt.get(key) is not None
        }

    def blanked(self, prompt: Prompt) -> Prompt:
        """The same prompt with every pixel set to the encoder's mean colour."""
        if "pixel_values" not in prompt:
            return prompt
        image_processor, side = self.processor.image_processor, self.processor.image_size
        colour = tuple(round(channel * 255) for channel in image_processor.image_mean)
        blank = image_processor(Image.new("RGB", (side, side), colour), return_tensors="pt")
        pixels = blank["pixel_values"].expand_as(prompt["pixel_values"])
        return {**prompt, "pixel_values": pixels}

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 64,
        generation: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The answers to a batch of conversations, without markers.

        Args:
            conversations: Computed together; greedily unless ``generation`` says otherwise.
            max_new_tokens: Longest answer.
            generation: Settings of transformers' ``GenerationConfig``.

        Raises:
            UserError: A conversation cannot be asked (``encode``: call it for each first, to leave
                such ones out), or an unknown setting.  Nothing has been computed then.
        """
        prompts = [self.encode(c, max_new_tokens=max_new_tokens) for c in conversations]
        answers = self.generate(prompts, max_new_tokens=max_new_tokens, generation=generation)
        return [self.decode(ids) for ids in answers]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens, without markers."""
        text: str = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        generation: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, without the token that ends them (arguments: ``answer``).

        Raises:
            UserError: An unknown setting.
        """
        settings = generation_settings(generation)
        if not prompts:
            return []
        inputs = self.batch(prompts)
        with self._one_at_a_time:
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        ends = settings.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        return [_before_end(row, ends) for row in new]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 64,
        generation: Mapping[str, Any] | None = None,
        watch: AbstractContextManager[Any] | None = None,
    ) -> Iterator[str]:
        """One answer in pieces of text, as they are computed.

        Closing the iterator ends the computation.

        Args:
            messages: The conversation.
            max_new_tokens: See ``answer``.
            generation: See ``answer``.
            watch: Entered while this answer is computed, and no other: a recorder of routing.

        Raises:
            UserError: See ``answer``; at once, not at the first piece.
        """
        prompt = self.encode(messages, max_new_tokens=max_new_tokens)
        settings = generation_settings(generation)
        settings["max_new_tokens"] = max_new_tokens
        return self._stream(prompt, settings, watch or nullcontext())

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Prompts as one input on the device: ``(B, S)``, padded at the left."""
        width = max(prompt["input_ids"].shape[1] for prompt in prompts)
        pad = self.processor.tokenizer.pad_token_id
        ids = [_left_padded(prompt["input_ids"], width, pad) for prompt in prompts]
        types = [_left_padded(prompt["mm_token_type_ids"], width, 0) for prompt in prompts]
        ones = [torch.ones_like(prompt["input_ids"]) for prompt in prompts]
        pixels = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
        inputs = {
            "input_ids": torch.cat(ids),
            "mm_token_type_ids": torch.cat(types),
            "attention_mask": torch.cat([_left_padded(row, width, 0) for row in ones]),
        }
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _stream(
        self, prompt: Prompt, settings: Mapping[str, Any], watch: AbstractContextManager[Any]
    ) -> Iterator[str]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        closed = threading.Event()
        failed: list[BaseException] = []

        def stop(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.full((len(ids),), closed.is_set(), device=ids.device)

        def work() -> None:
            try:
                with torch.no_grad(), self._one_at_a_time, watch:
                    self.model.generate(
                        **self.batch([prompt]),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                        **settings,
                    )
            except BaseException as error:
                failed.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=work, name="stream", daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()
        if failed:
            raise failed[0]

    def _template(self, messages: list[dict[str, Any]]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"The export's chat template refuses the conversation ({reason}): change the "
                "order or the roles of its messages."
            ) from error
        return text


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


def _left_padded(row: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (width - row.shape[1], 0), value=value)
