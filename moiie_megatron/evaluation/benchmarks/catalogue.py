"""The benchmarks of the paper and what lmms-eval calls and needs for them.

Task names, metrics and data sets are those of lmms-eval 0.7.3; ``tests/lmms_eval`` compares them
with the installed lmms-eval.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moiie_megatron.utils.errors import UserError

LMMS_EVAL: Final = "0.7.3"  # what the table below belongs to


@dataclass(frozen=True)
class DataSet:
    """A data set that a task reads.

    Attributes:
        name: On the Hugging Face hub.
        config: Of the data set; None is its default one.
        split: The split whose rows are asked.
    """

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Judge:
    """How a task reaches the language model that judges its answers.

    Attributes:
        url_suffix: What follows the base URL (``.../v1``) in ``OPENAI_API_URL``.
        model: The name that the task always asks for; None if ``MODEL_VERSION`` sets it.
    """

    url_suffix: str = ""
    model: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: In the paper's spelling.
        task: Of lmms-eval.
        metric: The one in the table; None: every metric that the task reports.
        data: What the task reads.
        scale: Factor from lmms-eval's number to the table's.
        judge: Who scores the answers; None: rules do.
        submission: Site that scores a file of answers; None: they are scored here.
        percent: Whether the table's number is one, and so goes into the mean.
    """

    name: str
    task: str
    metric: str | None
    data: tuple[DataSet, ...] = ()
    scale: float = 100.0
    judge: Judge | None = None
    submission: str | None = None
    percent: bool = True


_CHAT_COMPLETIONS: Final = "/chat/completions"


def _set(name: str, split: str, config: str | None = None) -> tuple[DataSet, ...]:
    return (DataSet(f"lmms-lab-encoder/{name}", config, split),)


# In the order of the paper's groups: general, hallucination, OCR, knowledge.
_AVERAGED: Final = (
    Benchmark(
        "MMBench-EN",
        "mmbench_en_dev_static",
        "gpt_eval_score",  # named after a judge, but computed by rules
        _set("MMBench", "dev", "en"),
        scale=1.0,
    ),
    Benchmark(
        "GQA",
        "gqa",
        "exact_match",
        (
            *_set("GQA", "testdev", "testdev_balanced_instructions"),
            *_set("GQA", "testdev", "testdev_balanced_images"),
        ),
    ),
    Benchmark("VQAv2", "vqav2_val", "exact_match", _set("VQAv2", "validation")),
    Benchmark("MM-Vet", "mmvet", "gpt_eval_score", _set("MMVet", "test"), scale=1.0, judge=Judge()),
    Benchmark("SEED-Image", "seedbench", "seed_image", _set("SEED-Bench", "test")),
    Benchmark("POPE", "pope", "pope_f1_score", _set("POPE", "test")),
    Benchmark(
        "HallusionBench",
        "hallusion_bench_image",
        "aAcc",
        _set("HallusionBench", "image"),
        scale=1.0,
        judge=Judge(_CHAT_COMPLETIONS, model="gpt-4"),
    ),
    Benchmark("TextVQA", "textvqa_val", "exact_match", _set("textvqa", "validation")),
    Benchmark("DocVQA", "docvqa_val", "anls", _set("DocVQA", "validation", "DocVQA")),
    Benchmark("ChartQA", "chartqa", "relaxed_overall", _set("ChartQA", "test")),
    Benchmark("AI2D", "ai2d", "exact_match", _set("ai2d", "test")),
    Benchmark("MMMU-val", "mmmu_val", "mmmu_acc", _set("MMMU", "validation")),
    Benchmark(
        "MathVista",
        "mathvista_testmini_format",
        "llm_as_judge_eval",
        (DataSet("AI4Math/MathVista", None, "testmini"),),
        scale=1.0,
        judge=Judge(),
    ),
    Benchmark(
        "ScienceQA-IMG", "scienceqa_img", "exact_match", _set("ScienceQA", "test", "ScienceQA-IMG")
    ),
)
# The paper draws routing on these two.
_PICTURES: Final = (
    Benchmark("MME", "mme", "mme_perception_score", _set("MME", "test"), scale=1.0, percent=False),
    Benchmark("MMVP", "mmvp", "mmvp_accuracy", (DataSet("lmms-lab-eval/MMVP", None, "train"),)),
)
# Other forms of the benchmarks above.
_OTHER_FORMS: Final = (
    Benchmark(
        "MMBench-EN-judged",
        "mmbench_en_dev",
        "gpt_eval_score",
        _set("MMBench", "dev", "en"),
        scale=1.0,
        judge=Judge(_CHAT_COMPLETIONS),
    ),
    Benchmark(
        "MMBench-EN-test",
        "mmbench_en_test",
        "submission",
        _set("MMBench", "test", "en"),
        submission="https://mmbench.opencompass.org.cn/mmbench-submission",
    ),
    Benchmark(
        "VQAv2-test",
        "vqav2_test",
        "submission",
        _set("VQAv2", "test"),
        submission="https://eval.ai/web/challenges/challenge-page/830",
    ),
    Benchmark(
        "DocVQA-test",
        "docvqa_test",
        "submission",
        _set("DocVQA", "test", "DocVQA"),
        submission="https://rrc.cvc.uab.es/?ch=17",
    ),
)

PAPER: Final = _AVERAGED + _PICTURES
BENCHMARKS: Final = PAPER + _OTHER_FORMS
SUITES: Final = {"paper": PAPER}


def averaged(benchmark: Benchmark) -> bool:
    """Whether the paper names the benchmark among those of its averages."""
    return benchmark in _AVERAGED


def chosen(names: Iterable[str], lmms_tasks: Iterable[str]) -> list[Benchmark]:
    """Benchmarks by name or by lmms-eval's task, in the order given and once each.

    Args:
        names: Upper and lower case do not matter.
        lmms_tasks: Other tasks of lmms-eval that may be named: every metric is reported then.

    Raises:
        UserError: Nothing has the name.
    """
    ours = {key.lower(): b for b in BENCHMARKS for key in (b.task, b.name)}
    others = {task.lower(): Benchmark(task, task, None, scale=1.0) for task in lmms_tasks}
    found: dict[Benchmark, None] = {}
    for name in filter(None, (name.strip() for name in names)):
        benchmark = ours.get(name.lower()) or others.get(name.lower())
        if benchmark is None:
            near = difflib.get_close_matches(name.lower(), [*ours, *others], n=3)
            advice = f"did you mean {', '.join(near)}?" if near else "--list prints the names."
            raise UserError(f"--tasks has {name}, which is no benchmark: {advice}")
        found[benchmark] = None
    if not found:
        raise UserError("--tasks names no benchmark: --list prints the names.")
    return list(found)
