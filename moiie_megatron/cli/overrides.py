"""Command lines with ``key=value`` overrides."""

from __future__ import annotations

import argparse


def parse_with_overrides(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse a command line in which overrides may stand anywhere, also behind options.

    argparse takes positional arguments of a subcommand from one place only.  Overrides end up in
    ``overrides``, where the subcommand has that argument.
    """
    arguments, rest = parser.parse_known_args()
    others = [word for word in rest if word.startswith("-") or "=" not in word]
    if others or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(others or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
