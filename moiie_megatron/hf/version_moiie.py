"""The releases of transformers that the code beside this file works with; checked on import."""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

# The tests have run with every minor version from the first to the last.
OLDEST = Version("5.19")
NEWEST = Version("5.24")
TESTED_VERSIONS = f"transformers {OLDEST} to {NEWEST}"


def check_version(installed: str) -> None:
    """Refuse a transformers that is too old and warn about one that has not been tested.

    Raises:
        ImportError: ``installed`` is older than the oldest tested version.
    """
    version = Version(installed)
    if version < OLDEST:
        raise ImportError(
            f"transformers {installed} is too old for this model: install {TESTED_VERSIONS}."
        )
    if version.is_prerelease or version.release[:2] > NEWEST.release:
        warnings.warn(
            f"This model has been tested with {TESTED_VERSIONS}, but {installed} is installed: "
            "compare its answers, or install a tested version.",
            stacklevel=2,
        )


check_version(transformers.__version__)
