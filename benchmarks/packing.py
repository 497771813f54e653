"""Rows of packed steps, packed by every rank alone and over the global batch.

    python benchmarks/packing.py

Nothing is trained: lengths are drawn, planned and counted, so that any number of ranks takes
seconds.  Lengths are those of the LLaVA-1.5 instruction mixture of 664k samples: its parts and
their sizes are from Liu et al., "Improved Baselines with Visual Instruction Tuning" (2023); the
text of a part is log-normal, with medians and spreads estimated from how many turns its records
have and how long they are.  An image is 729 tokens (SigLIP, 384 pixels).  Two further mixtures have
longer text and several images per sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moiie_megatron.data.packing.best_fit import best_fit_decreasing, split_to_count
from moiie_megatron.data.packing.deal_rows import deal_rows

IMAGE_TOKENS = 729
IMAGE_BYTES = 3 * 384 * 384
TOKEN_BYTES = 8 + 8 + 1  # token, label, type
CAPACITY = 4096
MAX_TEXT = 2048
# (data-parallel ranks, global batch size); 32 ranks are 64 GPUs with two tensor-parallel ranks.
LAYOUTS = ((8, 128), (32, 128), (32, 256), (128, 128), (128, 512), (128, 1024))
Plan = list[list[list[int]]]


@dataclass(frozen=True)
class Part:
    """A data set of the mixture: thousands of samples, and their text in tokens."""

    name: str
    thousands: int
    median: float
    spread: float
    has_image: bool = True


PARTS = (
    Part("LLaVA-Instruct", 158, 230, 0.5),  # conversations, descriptions, reasoning
    Part("ShareGPT", 40, 900, 0.7, has_image=False),
    Part("VQAv2", 83, 95, 0.5),  # some five short questions per picture
    Part("GQA", 72, 170, 0.5),  # some ten
    Part("OKVQA", 9, 30, 0.3),
    Part("OCRVQA", 80, 140, 0.4),
    Part("A-OKVQA", 66, 65, 0.3),  # one question with choices
    Part("TextCaps", 22, 80, 0.4),
    Part("RefCOCO", 48, 330, 0.5),  # boxes are many tokens
    Part("VG", 86, 420, 0.5),
)


@dataclass(frozen=True)
class Mixture:
    """The parts with text that is ``text`` times as long; some samples have two to four images."""

    name: str
    text: float = 1.0
    several_images: float = 0.0

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
        """Tokens and images of every sample."""
        weights = np.array([part.thousands for part in PARTS], float)
        which = rng.choice(len(PARTS), count, p=weights / weights.sum())
        median = np.array([part.median for part in PARTS])[which]
        spread = np.array([part.spread for part in PARTS])[which]
        text = self.text * median * np.exp(spread * rng.standard_normal(count))
        images = np.array([int(part.has_image) for part in PARTS])[which]
        several = rng.random(count) < self.several_images
        images *= np.where(several, rng.integers(2, 5, count), 1)
        room = np.minimum(MAX_TEXT, CAPACITY - IMAGE_TOKENS * images)
        lengths = np.clip(np.round(text).astype(int), 16, room) + IMAGE_TOKENS * images
        return lengths.tolist(), images.tolist()


MIXTURES = (
    Mixture("LLaVA-1.5"),
    Mixture("text x 2", text=2.0),
    Mixture("several images", text=1.5, several_images=0.15),
)


@dataclass(frozen=True)
class Result:
    """Means over steps, for one way of packing.

    Attributes:
        rows: Rows of a rank in a step.
        tokens_per_row: Without padding.
        filled: ``tokens_per_row`` divided by the capacity.
        tokens, images: Maximum of the ranks divided by their mean.
        waiting: Tokens of the longest row of every micro-batch divided by those of the mean row:
            what ranks that wait for each other in every micro-batch take.
        sent: Megabytes that a rank sends to others.
        plan_ms: Median time to plan a step.
        plan_ms_max: Its maximum.
    """

    rows: float
    tokens_per_row: float
    filled: float
    tokens: float
    images: float
    waiting: float
    sent: float
    plan_ms: float
    plan_ms_max: float


def pack_alone(lengths: list[int], ranks: int) -> Plan:
    """Every rank packs its own samples and splits rows until all ranks have equally many."""
    share = len(lengths) // ranks
    parts = [lengths[rank * share : (rank + 1) * share] for rank in range(ranks)]
    packed = [best_fit_decreasing(part, CAPACITY) for part in parts]
    number = max(map(len, packed))
    return [
        [[rank * share + i for i in row] for row in split_to_count(rows, part, number)]
        for rank, (rows, part) in enumerate(zip(packed, parts, strict=True))
    ]


def pack_together(lengths: list[int], images: list[int], ranks: int) -> Plan:
    return deal_rows(
        lengths, images, num_ranks=ranks, capacity=CAPACITY, num_image_tokens=IMAGE_TOKENS
    )


def measure(steps: list[tuple[list[int], list[int]]], ranks: int, *, together: bool) -> Result:
    """Pack all steps in one of the two ways."""
    found: list[list[float]] = []
    for lengths, images in steps:
        started = time.perf_counter()
        plan = pack_together(lengths, images, ranks) if together else pack_alone(lengths, ranks)
        seconds = time.perf_counter() - started
        tokens = sums(plan, lengths)
        pictures = sums(plan, images).sum(1)
        share = len(lengths) // ranks
        moved = [
            i for rank, rows in enumerate(plan) for row in rows for i in row if i // share != rank
        ]
        sent = sum(TOKEN_BYTES * lengths[i] + IMAGE_BYTES * images[i] for i in moved)
        found.append(
            [
                tokens.shape[1],
                tokens.mean(),
                tokens.sum(1).max() / tokens.sum(1).mean(),
                pictures.max() / pictures.mean(),
                tokens.max(0).sum() / tokens.mean(0).sum(),
                sent / ranks / 1e6,
                1000 * seconds,
            ]
        )
    rows, _, fullest, most_images, waiting, sent, _ = np.mean(found, axis=0).tolist()
    per_row = sum(sum(lengths) for lengths, _ in steps) / (rows * ranks * len(steps))
    times = [one[-1] for one in found]
    return Result(
        rows=rows,
        tokens_per_row=per_row,
        filled=per_row / CAPACITY,
        tokens=fullest,
        images=most_images,
        waiting=waiting,
        sent=sent,
        plan_ms=statistics.median(times),
        plan_ms_max=max(times),
    )


def sums(plan: Plan, values: list[int]) -> np.ndarray:
    """(ranks, rows): the sums over the samples of every row."""
    return np.array([[sum(values[i] for i in row) for row in rows] for rows in plan])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="steps per line of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    results = []
    for mixture in MIXTURES:
        rng = np.random.default_rng(arguments.seed)
        lengths, images = map(np.array, mixture.draw(rng, 100_000))
        print(
            f"\n{mixture.name}: {lengths.mean():.0f} tokens per sample, "
            f"{(lengths - IMAGE_TOKENS * images).mean():.0f} of them text, "
            f"{images.mean():.2f} images; 5, 50, 95 %: "
            + ", ".join(f"{n:.0f}" for n in np.percentile(lengths, [5, 50, 95]))
        )
        print(
            "\n| ranks | batch | packed | rows | tokens per row | filled | tokens max/mean ", end=""
        )
        print("| images max/mean | longest/mean row | MB sent | ms to plan (max) |")
        print("|" + "---|" * 11)
        for ranks, batch in LAYOUTS:
            steps = [mixture.draw(rng, batch) for _ in range(arguments.steps)]
            for together in (False, True):
                result = measure(steps, ranks, together=together)
                print(line(ranks, batch, result, together=together), flush=True)
                results.append(
                    {
                        "mixture": mixture.name,
                        "ranks": ranks,
                        "global_batch_size": batch,
                        "together": together,
                        **asdict(result),
                    }
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def line(ranks: int, batch: int, result: Result, *, together: bool) -> str:
    columns = [
        f"{ranks}",
        f"{batch}",
        "together" if together else "alone",
        f"{result.rows:.2f}",
        f"{result.tokens_per_row:.0f}",
        f"{result.filled:.2f}",
        f"{result.tokens:.2f}",
        f"{result.images:.2f}",
        f"{result.waiting:.2f}",
        f"{result.sent:.1f}",
        f"{result.plan_ms:.1f} ({result.plan_ms_max:.0f})",
    ]
    return "| " + " | ".join(columns) + " |"


if __name__ == "__main__":
    main()
