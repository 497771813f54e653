"""How a patch is declared: what it changes, why, and for which versions it is known to be needed.

Every file of this folder holds one subject and ends in ``PATCHES``, a tuple of declarations;
``registry.py`` joins them.  ``tests/unit/mcore/patches/test_registry.py`` goes through all of
them: every target must exist in the installed Megatron-Core, and every patch must still be
needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Minor versions of Megatron-Core whose last release was examined: 0.16.1, 0.17.1, 0.18.2, 0.19.2.
EXAMINED: Final = ("0.16", "0.17", "0.18", "0.19")


@dataclass(frozen=True)
class Patch:
    """One change of Megatron-Core or torch, or one of their private names that is used.

    Attributes:
        name: Unique; what the test of its need is called by.
        targets: Full dotted names of what is changed or used.
        reason: What goes wrong without it.
        kind: ``patch`` replaces or sets the targets, ``override`` redefines methods in a subclass
            and relies on when Megatron calls them, ``private name`` uses names that Megatron or
            torch may rename in any release.
        creates: The targets do not exist before the patch.
        versions: Minor versions of Megatron-Core that are known to need it.
        need_not_shown: Why no test on the CPU can show that it is needed; empty where one does.
    """

    name: str
    targets: tuple[str, ...]
    reason: str
    kind: Literal["patch", "override", "private name"] = "patch"
    creates: bool = False
    versions: tuple[str, ...] = EXAMINED
    need_not_shown: str = ""

    def is_needed_in(self, version: str) -> bool:
        """Whether a version of Megatron-Core needs it; unknown versions count as needing it."""
        minor = ".".join(version.split(".")[:2])
        return minor in self.versions or minor not in EXAMINED
