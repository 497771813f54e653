"""One person's conversation with an exported model, message by message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moiie_megatron.chat.limits import Limits
from moiie_megatron.chat.pictures import Picture, read_pictures
from moiie_megatron.chat.token_texts import token_texts
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.exported.token_routing import TokenRouting, TokenRoutingRecorder
from moiie_megatron.utils.errors import UserError

_USUAL_LENGTH: Final = 128


@dataclass(frozen=True)
class Conversation:
    """Questions and answers so far.

    Attributes:
        messages: As transformers takes them, with pictures as PIL images.
        pictures: Of all messages, in order.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """The tokens of a conversation and the experts that they took.

    Attributes:
        routing: Of prompt and answer.
        texts: Of each token.
        pictures: In the order of their image tokens.
        image_id: Id of image tokens.
        per_picture: Image tokens of one picture.
    """

    routing: TokenRouting
    texts: Sequence[str]
    pictures: Sequence[Picture]
    image_id: int
    per_picture: int


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    Attributes:
        text: Up to here.
        tokens: With the last reply, if the model has experts.
        conversation: With this answer; with the last reply.
    """

    text: str
    tokens: Tokens | None = None
    conversation: Conversation | None = None


@dataclass(frozen=True)
class Chat:
    """Answers messages of any number of people, one after the other.

    Attributes:
        model: The export.
        limits: On every message.
    """

    model: ExportedModel
    limits: Limits = field(default_factory=Limits)

    @property
    def has_experts(self) -> bool:
        """Whether tokens choose: the model is not dense."""
        return bool(self.model.model.config.moe_layers)

    @property
    def usual_length(self) -> int:
        """Tokens of an answer where nothing else is said."""
        return min(_USUAL_LENGTH, self.limits.new_tokens)

    def reply(
        self,
        conversation: Conversation,
        text: str,
        files: Sequence[str | Path] = (),
        *,
        new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> Iterator[Reply]:
        """Answer a message; closing the iterator ends the computation.

        Args:
            conversation: What has been said before.
            text: The message.
            files: Its pictures.
            new_tokens: Longest answer; default: ``usual_length``.
            temperature: 0 for the most likely tokens.

        Yields:
            The answer as it grows, and last of all the whole with its tokens.

        Raises:
            UserError: The message cannot be answered; the conversation is as it was.
        """
        new_tokens = self.usual_length if new_tokens is None else new_tokens
        if not 1 <= new_tokens <= self.limits.new_tokens or not 0 <= temperature <= 2:
            raise UserError(
                f"An answer of {new_tokens} tokens at temperature {temperature} is not offered: "
                f"use 1 to {self.limits.new_tokens} tokens and a temperature of 0 to 2."
            )
        asked = self._with_message(conversation, text, files)
        recorder = TokenRoutingRecorder(self.model.model) if self.has_experts else None
        sampling = {"do_sample": True, "temperature": temperature} if temperature else None
        answer = ""
        for piece in self.model.stream(
            asked.messages, max_new_tokens=new_tokens, generation=sampling, watch=recorder
        ):
            answer += piece
            yield Reply(answer)
        message = {"role": "assistant", "content": answer.strip()}
        done = Conversation((*asked.messages, message), asked.pictures)
        routing = recorder.routing() if recorder is not None else None
        tokens = None if routing is None else self._tokens(routing, asked.pictures)
        yield Reply(answer.strip(), tokens, done)

    def _with_message(
        self, conversation: Conversation, text: str, files: Sequence[str | Path]
    ) -> Conversation:
        text = self.limits.check_text(text)
        earlier = conversation.pictures
        pictures = read_pictures(files, len(earlier), self.model.processor, self.limits)
        if not text and not pictures:
            raise UserError("The message is empty: write a question.")
        parts: list[dict[str, Any]] = [{"type": "image", "image": p.square} for p in pictures]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return Conversation((*conversation.messages, message), (*earlier, *pictures))

    def _tokens(self, routing: TokenRouting, pictures: Sequence[Picture]) -> Tokens:
        processor = self.model.processor
        return Tokens(
            routing,
            token_texts(processor.tokenizer, routing.tokens_S.tolist()),
            pictures,
            processor.image_token_id,
            processor.num_image_tokens,
        )
