"""What is said before an evaluation starts: data that are missing, judges, submission servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moiie_megatron.evaluation.benchmarks.catalogue import LMMS_EVAL, Benchmark
from moiie_megatron.evaluation.benchmarks.run import Evaluation


def preflight(benchmarks: Sequence[Benchmark], evaluation: Evaluation) -> Iterator[str]:
    """Lines for a person: one for each benchmark, then what to do about what is missing."""
    places, version = evaluation.places, evaluation.environment.version
    yield f"{evaluation.target.description()}: {len(benchmarks)} benchmarks, into {evaluation.out}"
    if version != LMMS_EVAL:
        yield f"lmms-eval is {version}; the benchmarks' names are those of {LMMS_EVAL}."
    width = max(len(benchmark.name) for benchmark in benchmarks)
    for benchmark in benchmarks:
        remarks = [_data(benchmark, evaluation), *_needs(benchmark, evaluation)]
        yield f"  {benchmark.name:<{width}}  {'; '.join(remarks)}"
    missing = {data.name for b in benchmarks for data in places.missing(b)}
    if missing:
        yield f"Data sets are looked for in {places.description()}."
        yield (
            f"{len(missing)} are not here.  Where there is a network: hf download NAME "
            f"--repo-type dataset --local-dir {places.directory}/NAME"
        )
    if evaluation.judge is None and any(benchmark.judge for benchmark in benchmarks):
        yield (
            "Judged benchmarks are answered and not scored: the same command with --judge-url URL "
            "(and --judge-model NAME) scores the answers."
        )


def startable(benchmarks: Sequence[Benchmark], evaluation: Evaluation) -> list[Benchmark]:
    """The benchmarks whose data are here or can be downloaded."""
    places = evaluation.places
    return [b for b in benchmarks if not places.offline or not places.missing(b)]


def _data(benchmark: Benchmark, evaluation: Evaluation) -> str:
    if not benchmark.data:
        return f"lmms-eval's {benchmark.task}"
    missing = sorted({data.name for data in evaluation.places.missing(benchmark)})
    if not missing:
        found = {str(evaluation.places.find(data)) for data in benchmark.data}
        return f"data in {', '.join(sorted(found))}"
    what = "not started (offline)" if evaluation.places.offline else "will be downloaded"
    return f"no data, {', '.join(missing)}: {what}"


def _needs(benchmark: Benchmark, evaluation: Evaluation) -> Iterator[str]:
    if benchmark.judge is not None:
        name = benchmark.judge.model
        named = f" that has a model named {name}" if name else ""
        judge = evaluation.judge
        yield f"judged by {judge.url}" if judge else f"needs a judge{named} (--judge-url)"
    if benchmark.submission is not None:
        yield f"writes a file for {benchmark.submission}"
