"""The conversation of a parsed JSON record, whatever names its keys and roles have.

LLaVA's names (``conversations``, ``from``, ``value``, ``human``, ``gpt``, ``image``), those of chat
messages (``messages``, ``role``, ``content``, ``user``, ``assistant``, ``images``, and content in
parts) and a system prompt in a key of its own are read; docs/data.md lists them.  A key that may
name a picture, a video or a sound and is not read makes a record unusable, because the model would
be trained to answer about what it does not see.  Any other key is left
alone and noted, unless it begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from moiie_megatron.data.records.record import PLACEHOLDER, BadRecord, Record, Role, Turn

_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_CONVERSATION_KEYS: Final = ("conversations", "messages")
_IMAGE_KEYS: Final = ("image", "images")
_SYSTEM_KEYS: Final = ("system", "system_prompt")
# Read by tools besides the conversation.
_OTHER_KEYS: Final = ("id", "kind", "question_id", "category")
_KNOWN: Final = frozenset((*_CONVERSATION_KEYS, *_IMAGE_KEYS, *_SYSTEM_KEYS, *_OTHER_KEYS))
# Words that a key for pictures, videos or sounds starts with, before any `_` or ending.
_PICTURES: Final = ("image", "img", "picture", "photo", "pixel")
_NOT_SUPPORTED: Final = ("video", "audio", "sound", "speech", "wav")
_ENDINGS: Final = ("", "s", "path", "paths", "file", "files", "filename", "url", "urls", "name")
_UNSUPPORTED_PLACEHOLDERS: Final = ("<video>", "<audio>")
_DROPPED_TURN: Final = "the assistant speaks first: that turn is dropped"


def parse_record(value: Any, default_id: str = "") -> Record:
    """The ``Record`` of a parsed record.

    Images without placeholders are put in front of the first human turn.  A turn of the assistant
    at the beginning is dropped, as LLaVA does.

    Args:
        value: The parsed JSON value: an object, or the list of turns alone.
        default_id: Used if the record has no ``id``.

    Raises:
        BadRecord: Not an object, no conversation, speakers that do not alternate, images under
            another key than ``image`` or ``images``, videos or sounds, or the numbers of
            ``<image>`` placeholders and images differ.
    """
    if isinstance(value, list):
        value = {"conversations": value}
    if not isinstance(value, dict):
        raise BadRecord(f"a record must be a JSON object, not {type(value).__name__}")
    said = list(_turns(_one_of(value, _CONVERSATION_KEYS)))
    turns = _with_system([one.turn for one in said], _one_of(value, _SYSTEM_KEYS))
    turns, notes = _in_order(turns)
    images = _images(value, [path for one in said for path in one.images])
    _refuse_other_media(value, turns, has_images=bool(images))
    placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if images and not placeholders:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        text = f"{PLACEHOLDER}\n" * len(images) + turns[first].text
        turns[first] = replace(turns[first], text=text)
    elif placeholders != len(images):
        raise BadRecord(f"{placeholders} {PLACEHOLDER} placeholders but {len(images)} images")
    notes += [
        f"key {str(key)[:80]!r} is not read"
        for key in value
        if key not in _KNOWN and not key.startswith("_")
    ]
    # JSON can express a lone surrogate, which could not be printed.
    name = str(value.get("id", default_id)).encode(errors="backslashreplace").decode()
    notes = [note.encode(errors="backslashreplace").decode() for note in notes]
    return Record(name, images, tuple(turns), tuple(notes))


@dataclass(frozen=True)
class _Said:
    """A turn, and the images that the parts of its content name."""

    turn: Turn
    images: tuple[str, ...] = ()


def _one_of(value: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the only key of ``keys`` that the record has; None if it has none."""
    given = {key: value[key] for key in keys if value.get(key) not in (None, [])}
    if len(given) > 1 and len({repr(found) for found in given.values()}) > 1:
        raise BadRecord(f"{' and '.join(given)} differ: keep one of them")
    return next(iter(given.values()), None)


def _turns(value: Any) -> Iterator[_Said]:
    if not isinstance(value, list) or not value:
        raise BadRecord("conversations (or messages) must be a list with at least one turn")
    for i, item in enumerate(value):
        speaker, content = None, None
        if isinstance(item, dict):
            speaker = item.get("from", item.get("role"))
            content = item.get("value", item.get("content"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise _bad_turn(i, item)
        if isinstance(content, list):
            yield _of_parts(_ROLES[speaker], content, i)
        elif isinstance(content, str):
            yield _Said(Turn(_ROLES[speaker], _checked_unicode(content, f"turn {i}")))
        else:
            raise _bad_turn(i, item)


def _bad_turn(i: int, item: Any) -> BadRecord:
    return BadRecord(
        f"turn {i} must have from (human, gpt or a leading system) and value (text), or role "
        f"(user, assistant, system) and content, not {_shown(item)}"
    )


def _of_parts(role: Role, parts: list[Any], i: int) -> _Said:
    """A turn whose content is a list of texts and images, as chat templates take it."""
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += f"{PLACEHOLDER}\n"
            path = next((part[k] for k in ("image", "path", "url", "image_url") if k in part), None)
            images += [] if path is None else list(_paths(path))
        else:
            raise BadRecord(f"turn {i} has a part that is neither text nor image: {_shown(part)}")
    return _Said(Turn(role, _checked_unicode(text, f"turn {i}")), tuple(images))


def _with_system(turns: list[Turn], system: Any) -> list[Turn]:
    """The turns, with the system prompt of a key of its own in front."""
    if not system:
        return turns
    if not isinstance(system, str):
        raise BadRecord(f"system must be a text, not {_shown(system)}")
    if turns[0].role != "system":
        return [Turn("system", _checked_unicode(system, "system")), *turns]
    if turns[0].text != system:
        raise BadRecord("system and the leading system turn differ: keep one of them")
    return turns


def _in_order(turns: list[Turn]) -> tuple[list[Turn], list[str]]:
    """The turns that are used, and what is to be noted."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    spoken, notes = turns[len(system) :], []
    if len(spoken) > 1 and spoken[0].role == "assistant":
        spoken, notes = spoken[1:], [_DROPPED_TURN]
    for i, turn in enumerate(spoken):
        expected: Role = "assistant" if i % 2 else "user"
        if turn.role != expected:
            number = len(turns) - len(spoken) + i
            raise BadRecord(f"turns must alternate human, gpt: turn {number} is by the {turn.role}")
    if not spoken:
        raise BadRecord("the conversation has no human turn")
    return [*system, *spoken], notes


def _images(value: dict[str, Any], in_parts: list[str]) -> tuple[str, ...]:
    """The image paths of the record, from its key or from the parts of its turns."""
    given = _one_of(value, _IMAGE_KEYS)
    paths = () if given is None else _paths(given)
    if paths and in_parts and list(paths) != in_parts:
        raise BadRecord("image and the images in the turns' contents differ: keep one of them")
    return paths or tuple(in_parts)


def _paths(value: Any) -> tuple[str, ...]:
    paths = value if isinstance(value, list) else [value]
    # Columns of images in Hugging Face data sets, and image_url of chat messages.
    paths = [
        next((p[k] for k in ("path", "url") if p.get(k)), p) if isinstance(p, dict) else p
        for p in paths
    ]
    if not all(isinstance(path, str) and path for path in paths):
        raise BadRecord(f"image must be a path or a list of paths, not {_shown(value)}")
    return tuple(_checked_unicode(path, "image") for path in paths)


def _refuse_other_media(value: dict[str, Any], turns: list[Turn], *, has_images: bool) -> None:
    """Refuse a record that names media which are not read."""
    for key, content in value.items():
        if key in _KNOWN or content in (None, "", [], {}, False):
            continue
        if _names(key, _NOT_SUPPORTED):
            raise BadRecord(f"key {key}: videos and sounds are not supported")
        if not has_images and _names(key, _PICTURES):
            raise BadRecord(f"key {key} is not read: images belong to image, a path or a list")
    for turn in turns:
        if turn.role == "assistant":  # may speak of the HTML element
            continue
        for placeholder in _UNSUPPORTED_PLACEHOLDERS:
            if placeholder in turn.text:
                raise BadRecord(f"{placeholder} in the text: videos and sounds are not supported")


def _names(key: str, words: tuple[str, ...]) -> bool:
    """Whether a key is one of the words, or a word and what holds its files."""
    squeezed = key.lower().replace("_", "").replace("-", "")
    return any(squeezed == word + ending for word in words for ending in _ENDINGS)


def _shown(value: Any) -> str:
    return str(value)[:80].encode(errors="backslashreplace").decode()


def _checked_unicode(text: str, where: str) -> str:
    """``text``, refused if it has a lone surrogate, which tokenizers and file systems refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord(f"{where} has a lone surrogate ({escape})") from error
    return text
