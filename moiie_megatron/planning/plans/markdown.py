"""Markdown tables that can also be read as text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first one is left-aligned, and the others where they hold words.

    Args:
        header: Names of the columns.
        rows: Their cells.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    numeric = [
        bool(rows) and i > 0 and all(_is_number(row[i]) for row in rows if row[i])
        for i in range(len(header))
    ]

    def written(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * (width - 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([written(lines[0]), f"| {' | '.join(rule)} |", *map(written, lines[1:])])


def _is_number(cell: str) -> bool:
    return cell[0].isdigit() or cell[0] == "-"
