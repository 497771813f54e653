"""What a search has found, as text for people and as values for programs."""

from __future__ import annotations

from typing import Any

from moiie_megatron.planning.plans.markdown import table
from moiie_megatron.planning.plans.plan_report import (
    layout_text,
    layout_values,
    plan_values,
    term_name,
)
from moiie_megatron.planning.search.search import Found, SearchResult


def search_text(result: SearchResult) -> str:
    """Layouts that fit, the fastest first, and a sentence for each of the others."""
    parts = ["# Layouts"]
    if result.found:
        header = ["", "layout", "memory", "step, s", "tokens/s", "MFU", "largest term", "layers"]
        rows = [_row(number, found) for number, found in enumerate(result.found, 1)]
        parts.append(table(header, rows))
    else:
        parts.append("No layout fits.")
    for title, refused in (
        ("## Not possible", result.refused),
        ("## Not simulated", result.not_simulated),
    ):
        if refused:
            parts += [title, "\n".join(f"- {one.layout}: {one.reason}" for one in refused)]
    return "\n\n".join(parts) + "\n"


def search_values(result: SearchResult) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "found": [
            {
                "is_deep": one.is_deep,
                "layout_text": layout_text(one.plan.config),
                **layout_values(one.plan.config),
                "plan": plan_values(one.plan),
            }
            for one in result.found
        ],
        "refused": [{"layout": one.layout, "reason": one.reason} for one in result.refused],
        "not_simulated": [
            {"layout": one.layout, "reason": one.reason} for one in result.not_simulated
        ],
    }


def _row(number: int, found: Found) -> list[str]:
    plan = found.plan
    time, memory = plan.time, plan.fullest.memory
    return [
        str(number),
        layout_text(plan.config),
        f"{memory.total / plan.hardware.memory:.0%}",
        f"{time.seconds.low:.2f} to {time.seconds.high:.2f}",
        f"{time.tokens_per_second.low:,.0f} to {time.tokens_per_second.high:,.0f}",
        f"{time.mfu.low:.0%} to {time.mfu.high:.0%}",
        term_name(time.bound),
        "all" if found.is_deep else "few",
    ]
