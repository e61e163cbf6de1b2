"""Whatever is matched equals what was written: spellings of attention and MLP at random, and what is one step away.

60 cases by default, 2,000 with `pytest -m full`; the same ones every time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st

from tests.property.attention import attention
from tests.property.expressions import written
from tests.property.mlp import mlp
from tests.property.running import assert_equals_eager, runs, through_dynamo, traced
from tests.property.source import Spelling
from tests.runtime.models import one_thread

# What is drawn from, how many of 60 cases, and the share of them that has to be rewritten: else nothing is tried.
SPELLINGS: dict[str, tuple[st.SearchStrategy[Spelling], int, float]] = {
    "attention": (attention(odd=False), 12, 0.3),
    "attention, odd": (attention(odd=True), 8, 0.0),
    "mlp": (mlp(odd=False), 12, 0.3),
    "mlp, odd": (mlp(odd=True), 8, 0.0),
    "patterns": (written(odd=False), 12, 0.2),
    "patterns, odd": (written(odd=True), 8, 0.0),
}
FULL = 2000 // 60 + 1  # times as many


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One thread, and no report of every model."""
    logger = logging.getLogger("chipmunk_fx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with one_thread():
        yield
    logger.setLevel(before)


def check(name: str, times: float, make: Callable[..., Any] = traced) -> None:
    strategy, cases, share = SPELLINGS[name]
    seen: Counter[str] = Counter()

    @settings(
        max_examples=max(1, round(cases * times)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(spelling: Spelling) -> None:
        note(f"\n{spelling!r}")
        if not runs(*spelling.make()):
            reject()  # operands that do not fit, or overflow, which the making of random expressions does not rule out
        outcome = assert_equals_eager(*spelling.make(), make)
        seen["cases"] += 1
        seen["rewritten"] += outcome.attention + outcome.mlp > 0

    run()
    print(f"{name}: {seen['rewritten']} of {seen['cases']} rewritten")
    assert seen["rewritten"] >= share * seen["cases"], dict(seen)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    check(name, 1)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SPELLINGS)
def test_2000_spellings(name: str):
    check(name, FULL)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_through_dynamo(name: str):
    check(name, 1 / 6, through_dynamo)
