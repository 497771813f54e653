"""The averages that the paper reports (arXiv 2508.09779), to stand beside one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class PaperAverage:
    """Averages over 13 benchmarks, in percent, of the systems that the paper compares.

    Attributes:
        model: Language model, vision encoder where it is not SigLIP, and instruction data.
    """

    model: str
    dense: float
    vanilla: float
    modality: float
    moiie: float


PAPER_AVERAGES: Final = (
    PaperAverage("Phi-3-mini, 2M", 57.1, 57.2, 57.4, 57.9),
    PaperAverage("Phi-3-mini, 2.7M", 58.8, 59.1, 59.1, 60.0),
    PaperAverage("LLaMA-3-8B, 2M", 59.4, 59.4, 60.0, 60.6),
    PaperAverage("Phi-3-mini with CLIP, 2.7M", 58.4, 58.5, 58.6, 59.5),
    PaperAverage("Phi-3-mini, OneVision 4M", 60.0, 60.7, 60.4, 61.9),
)
