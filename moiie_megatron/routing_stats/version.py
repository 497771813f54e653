"""The version of routing records, apart from their reader, which needs pydantic."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1  # raised when older readers would misread a record
