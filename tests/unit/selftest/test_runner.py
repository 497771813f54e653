"""Every check gets a verdict, whatever the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from moiie_megatron.selftest.check import Finding, Session, failed, passed, skipped
from moiie_megatron.selftest.exchange import Exchange, combine
from tests.unit.selftest.sessions import check, run_checks, session


def test_an_error_is_a_fail_that_names_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_checks(
        [
            check("first", ValueError("no such thing.")),
            check("second", failed("wrong", figure=3)),
            check("third", passed("right")),
            check("fourth", skipped("not here")),
        ],
        tmp_path / "report.json",
    )
    assert found["status"] == "FAIL"
    verdicts = {name: (c["status"], c["reason"]) for name, c in found["checks"].items()}
    assert verdicts == {
        "first": ("FAIL", "ValueError (no such thing): mend it"),
        "second": ("FAIL", "wrong: mend it"),
        "third": ("PASS", "right"),
        "fourth": ("SKIP", "not here"),
    }
    assert "sessions.py" in found["checks"]["first"]["trace"]
    assert found["checks"]["second"]["figures"] == {"figure": 3}
    printed = capsys.readouterr().out
    assert "FAIL  first" in printed and "Traceback" in printed
    assert printed.splitlines()[-1].startswith("1 PASS, 2 FAIL, 1 SKIP")


def test_nothing_failed(tmp_path: Path) -> None:
    checks = [check("a", passed("")), check("b", skipped(""))]
    assert run_checks(checks, tmp_path / "r.json")["status"] == "PASS"


def test_checks_after_an_essential_one_are_skipped(tmp_path: Path) -> None:
    checks = [
        check("a", failed("broken"), essential=True),
        check("b", passed("")),
        check("c", RuntimeError("")),
    ]
    found = run_checks(checks, tmp_path / "r.json")["checks"]
    assert [found[name]["status"] for name in "abc"] == ["FAIL", "SKIP", "SKIP"]
    assert found["c"]["reason"] == "not run, because a failed"


def test_what_a_check_needs(tmp_path: Path) -> None:
    checks = [
        check(need, AssertionError("ran"), needs=(need,)) for need in ("cuda", "directory", "time")
    ]
    found = run_checks(checks, tmp_path / "r.json")["checks"]
    assert {name: c["status"] for name, c in found.items()} == dict.fromkeys(found, "SKIP")
    assert "--directory" in found["directory"]["reason"]


def test_the_file_tells_of_a_process_that_died(tmp_path: Path) -> None:
    """Before a check starts, the file says what holds if it never ends."""
    file = tmp_path / "r.json"
    before: list[str] = []

    def run(given: Session) -> Finding:
        before.append(file.read_text())
        return passed("alive")

    checks = [check("a", passed("")), check("b", passed(""))]
    checks[1] = type(checks[1])(**(checks[1].__dict__ | {"run": run}))
    found = run_checks(checks, file, session())
    assert '"the process ended during this check"' in before[0] and '"FAIL"' in before[0]
    assert found["status"] == "PASS"


def test_a_fail_on_any_rank_is_a_fail() -> None:
    findings = {
        0: passed("fine", figure=0),
        1: failed("wrong", figure=1),
        2: Finding("FAIL", "lost", fatal=True, seconds=3.0),
    }
    found = combine(findings)
    assert (found.status, found.reason) == ("FAIL", "rank 1: wrong")
    assert found.figures == {"figure": 1}
    assert found.fatal and found.seconds == 3.0
    assert combine({0: passed("fine"), 1: passed("")}).reason == "fine"
    assert combine({0: passed("fine"), 1: skipped("no")}).status == "SKIP"


def test_ranks_exchange_findings_without_collectives() -> None:
    store = dist.HashStore()
    ranks = [Exchange(store, rank, 2) for rank in (0, 1)]
    ranks[0].post("a", passed("fine", figure=1.5))
    assert set(ranks[1].posted("a")) == {0} and not ranks[1].any_error("a")
    ranks[1].post("a", Finding("FAIL", "wrong", trace="Traceback"))
    assert ranks[0].any_error("a") and not ranks[0].any_error("b")
    found = ranks[0].all("a")
    assert found[0] == passed("fine", figure=1.5) and found[1].trace == "Traceback"
