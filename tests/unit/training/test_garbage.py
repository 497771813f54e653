"""Garbage is collected at given steps and at no other time."""

from __future__ import annotations

import gc

import pytest

from moiie_megatron.training.garbage import collect_every


def test_collections_are_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    with collect_every(3) as after_step:
        monkeypatch.setattr(gc, "collect", collected.append)
        assert not gc.isenabled()
        for step in range(1, 8):
            after_step(step)
    assert collected == [1, 1]  # the generation, after steps 3 and 6
    assert gc.isenabled()


def test_python_collects_again_after_an_error() -> None:
    with pytest.raises(ValueError), collect_every(3):
        raise ValueError
    assert gc.isenabled()


def test_python_decides_without_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("not asked for"))
    with collect_every(None) as after_step:
        assert gc.isenabled()
        after_step(1)


def test_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with collect_every(1) as after_step:
            after_step(1)
        assert not gc.isenabled()
    finally:
        gc.enable()
