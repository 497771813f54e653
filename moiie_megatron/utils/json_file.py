"""Files of one JSON value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moiie_megatron.utils.errors import UserError


def read_json_object(path: str | Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        advice: What to do if it holds none; ends the message.

    Raises:
        UserError: The file cannot be read, is not JSON, is nested too deeply, or holds another
            value than an object.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}): {advice}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: {advice}.")
    return value
