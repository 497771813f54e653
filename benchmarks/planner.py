"""How far the planner's simulation is off: real runs on this machine against their simulations.

    python benchmarks/planner.py [--json FILE] [--parts exact,natural,ranking]

Prints tables in Markdown; a difference is the simulation less the real run, the worst of all ranks.

exact    26 layouts on one to four Gloo processes, tokens routed by an assumption in both: bytes of
         weights, gradients and optimizer, activation peak (by the same tracker, and by torch's
         profiler), rows of every expert, calls and bytes of every collective, FLOPs (also those of
         torch's profiler).
natural  Steps of a run on real data, whose routers choose, predicted from the routing of earlier
         steps.
ranking  Step times of 15 layouts with the same samples, predicted from rates of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import planner_natural
import planner_ranking
from planner_cases import CASES, Case
from scipy.stats import spearmanr

from moiie_megatron.mcore.process_lifetime import kill_children_on_exit, run_child

HERE: Final = Path(__file__).resolve().parent
PARTS: Final = ("exact", "natural", "ranking")
Json = dict[str, Any]


def launch(script: str, processes: int, out: Path, *words: str) -> None:
    """Run one of the other programs on so many processes."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    where = ("--local-addr=localhost", f"--nproc-per-node={processes}")
    run_child([*torchrun, *where, str(HERE / script), "--out", str(out), *words])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table."""
    print("\n| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def percent(simulated: float, real: float) -> float:
    """Signed, of the real value."""
    return 100 * (simulated / real - 1) if real else 0.0


def worst(differences: Iterable[float]) -> float:
    """The one that is farthest from 0, with its sign."""
    return max(differences, key=abs, default=0)


def ranks_of(folder: Path, case: Case) -> list[Json]:
    files = [folder / f"{case.name}.{rank}.json" for rank in range(case.world)]
    return [json.loads(file.read_text()) for file in files]


def exact(folder: Path) -> Json:
    """Real and simulated steps with the same routing."""
    for world in sorted({case.world for case in CASES}):
        launch("planner_exact.py", world, folder, *(["--profile"] if world == 1 else []))
    found = {case.name: ranks_of(folder, case) for case in CASES}
    summaries = {name: summary(ranks) for name, ranks in found.items()}
    table(
        (
            *("layout", "ranks", "states, MB", "off, B", "activations, MB", "off, %"),
            *("expert rows", "off", "wire, MB", "off, B", "GFLOP", "off, %"),
        ),
        (
            (
                *(case.name, str(case.world), f"{s['states'] / 1e6:.2f}", f"{s['states_off']:+d}"),
                *(f"{s['peak'] / 1e6:.2f}", f"{s['peak_off']:+.4f}"),
                *(str(s["rows"]), f"{s['rows_off']:+d}"),
                *(f"{s['wire'] / 1e6:.2f}", f"{s['wire_off']:+d}"),
                *(f"{s['flops'] / 1e9:.2f}", f"{s['flops_off']:+.4f}"),
            )
            for case in CASES
            for s in (summaries[case.name],)
        ),
    )
    table(
        ("layout", "bytes that rank 0 sends, MB, by group and collective"),
        ((case.name, wire_by_kind(found[case.name][0])) for case in CASES if case.world > 1),
    )
    profiled = [(name, ranks[0]) for name, ranks in found.items() if ranks[0]["profiled"]]
    table(
        ("layout", "peak by torch.profiler, MB", "off, %", "GFLOP by torch.profiler", "off, %"),
        (
            (
                name,
                f"{rank['profiled']['peak'] / 1e6:.2f}",
                f"{percent(rank['peak'][0], rank['profiled']['peak']):+.3f}",
                f"{profiled_flops(rank) / 1e9:.2f}",
                f"{percent(rank['flops'][0], profiled_flops(rank)):+.4f}",
            )
            for name, rank in profiled
        ),
    )
    return {"layouts": summaries, "ranks": found}


def profiled_flops(rank: Json) -> int:
    return int(rank["profiled"]["flops"] + rank["profiled"]["other_flops"])


def summary(ranks: Sequence[Json]) -> Json:
    """Sizes of rank 0 and the worst differences of all ranks."""
    first = ranks[0]
    return {
        "states": sum(real for _, real in first["states"].values()),
        "states_off": worst(a - b for rank in ranks for a, b in rank["states"].values()),
        "peak": first["peak"][1],
        "peak_off": worst(percent(*rank["peak"]) for rank in ranks),
        "rows": sum(map(sum, first["expert_rows"][1].values())),
        "rows_off": worst(
            a - b
            for rank in ranks
            for layer in rank["expert_rows"][1]
            for a, b in zip(*(rows[layer] for rows in rank["expert_rows"]), strict=True)
        ),
        "wire": sum(real[1] for _, real in first["wire"].values()),
        # Also of calls, which have no bytes where there is nothing to send.
        "wire_off": worst(
            a - b
            for rank in ranks
            for pair in rank["wire"].values()
            for a, b in zip(*pair, strict=True)
        ),
        "flops": first["flops"][1],
        "flops_off": worst(percent(*rank["flops"]) for rank in ranks),
    }


def wire_by_kind(rank: Json) -> str:
    """Real megabytes by group and collective; counts and flags of some bytes are left out."""
    sizes: Counter[str] = Counter()
    for key, (_, (_, size)) in rank["wire"].items():
        group, operation = key.split()[:2]
        name = operation.replace("_single", "").replace("_coalesced", "").replace("_", "-")
        sizes[f"{group} {name}"] += size
    return ", ".join(f"{key} {size / 1e6:.2f}" for key, size in sizes.items() if size >= 5000)


def natural(folder: Path) -> Json:
    """Steps with the routers' own choices."""
    for world in planner_natural.CASES:
        launch("planner_natural.py", world, folder)
    found: Json = {}
    rows = []
    for world, cases in planner_natural.CASES.items():
        for name in cases:
            files = [folder / f"{name}.{rank}.json" for rank in range(world)]
            steps = [step for file in files for step in json.loads(file.read_text())]
            found[name] = steps
            errors = {
                key: [percent(*step[key]) for step in steps]
                for key in ("rows", "fullest", "peak", "wire", "flops")
            }
            rows.append(
                (
                    f"{name} ({len(steps)} steps of ranks)",
                    *(f"{statistics.mean(e):+.2f} ({worst(e):+.2f})" for e in errors.values()),
                )
            )
    table(
        (
            *("routers' own choices: off, %, mean (worst)", "rows of a rank"),
            *("rows of the fullest expert", "activation peak", "wire", "FLOPs"),
        ),
        rows,
    )
    return found


def ranking(folder: Path, rounds: int) -> Json:
    """Predicted and measured step times."""
    launch("planner_ranking.py", planner_ranking.WORLD, folder, "--rounds", str(rounds))
    ranks = [
        planner_ranking.Measured(**pickle.loads((folder / f"{rank}.pickle").read_bytes()))
        for rank in range(planner_ranking.WORLD)
    ]
    hardware = planner_ranking.machine(ranks)
    predicted = planner_ranking.predictions(ranks, hardware)
    # Other programs on the machine only ever take time away.
    measured = {name: min(times) for name, times in ranks[0].seconds.items()}
    medians = {name: statistics.median(times) for name, times in ranks[0].seconds.items()}
    order = sorted(measured, key=measured.__getitem__)
    table(
        ("layout", "fastest step, ms", "median, ms", "predicted, ms", "off the fastest, %"),
        (
            (
                name,
                f"{1e3 * measured[name]:.0f}",
                f"{1e3 * medians[name]:.0f}",
                f"{1e3 * predicted[name]:.0f}",
                f"{percent(predicted[name], measured[name]):+.0f}",
            )
            for name in order
        ),
    )

    def correlation(times: Mapping[str, float]) -> float:
        pairs = [(times[name], predicted[name]) for name in order]
        return float(spearmanr(*zip(*pairs, strict=True)).statistic)

    reached = hardware.fast
    print(
        f"\nSpearman's rank correlation of predictions with the fastest steps "
        f"{correlation(measured):.3f}, with medians {correlation(medians):.3f}.\n"
        "Measured rates of a core: "
        f"{hardware.flops / 1e9:.1f} GFLOP/s and {hardware.memory_bandwidth / 1e9:.2f} GB/s, "
        f"{reached.launch * 1e6:.1f} us a kernel, {reached.latency * 1e6:.0f} us a collective, "
        f"{hardware.node_link / 1e9:.2f} GB/s a rank."
    )
    return {
        "fastest": measured,
        "median": medians,
        "predicted": predicted,
        "correlation": correlation(measured),
        "correlation_of_medians": correlation(medians),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of the ranking")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts has {part!r}, which is none of {', '.join(PARTS)}")
    kill_children_on_exit()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: Json = {}
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "exact":
                result[part] = exact(folder)
            elif part == "natural":
                result[part] = natural(folder)
            else:
                result[part] = ranking(folder, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
