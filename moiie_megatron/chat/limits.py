"""What a message to the page may hold."""

from __future__ import annotations

from dataclasses import dataclass

from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Upper limits for whoever can open the page.

    Attributes:
        megabytes: Of one file.
        megapixels: Of one picture, decoded.
        pictures: In a conversation.
        characters: Of one message.
        new_tokens: Of one answer.
        waiting: Messages that wait for the one that is answered.
    """

    megabytes: int = 20
    megapixels: int = 64
    pictures: int = 4
    characters: int = 8000
    new_tokens: int = 512
    waiting: int = 16

    def check_text(self, text: str) -> str:
        """The text of a message without white space around it.

        Raises:
            UserError: It is too long, or not Unicode.
        """
        if len(text) > self.characters:
            raise UserError(
                f"The message has {len(text)} characters, more than {self.characters}: shorten it."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError("The message is not valid Unicode: write it again.") from error
        return text.strip()
