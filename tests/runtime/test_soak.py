"""Thousands of generations in one process: no memory gathers, no call gets slower."""

import gc
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import TinyDiT, calls, compiled, run, words

SHAPES = ((16, 8, 1), (24, 8, 1), (16, 5, 1), (16, 8, 2), (20, 11, 1))  # side, words, batch
STEPS = range(950, 0, -95)
SETTLED = 10  # generations after which nothing may grow
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """After so many generations: bytes of the process, of our caches, and processor seconds of the last round of shapes."""

    generations: int
    resident: int
    caches: int
    seconds: float

    def __str__(self) -> str:
        sizes = f"{self.resident / MEBIBYTE:8.1f} MiB resident {self.caches / 1e6:6.2f} MB of caches"
        return f"{self.generations:5d} generations {sizes} {self.seconds * 1e3:7.1f} ms a round"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(count: int, every: int) -> list[Sample]:
    """`count` generations of ten steps, in turn in every shape and by every way to begin one."""
    model: Any = compiled(TinyDiT())
    inputs = [calls(STEPS, [words(1, n, batch)], side=side, batch=batch) for side, n, batch in SHAPES]
    begins = [nullcontext, lambda: chipmunk_fx.reset(model) or nullcontext(), lambda: chipmunk_fx.generation(model)]
    samples: list[Sample] = []
    seconds = 0.0
    for done in range(1, count + 1):
        index, start = done % len(SHAPES), time.process_time()
        with nullcontext() if done == 1 else begins[index % len(begins)]():
            run(model, inputs[index])
        seconds += time.process_time() - start
        if done % len(SHAPES) == 0:
            if done == SETTLED or (done > SETTLED and done % every == 0):
                gc.collect()
                (session,) = registry.sessions(model)
                samples.append(Sample(done, resident(), session.account().total, seconds))
            seconds = 0.0
    return samples


def assert_flat(samples: list[Sample], slack: int) -> None:
    print("", *samples, sep="\n")
    settled, *later = samples
    assert settled.generations == SETTLED
    assert {s.caches for s in later} == {settled.caches}
    assert max(s.resident for s in later) <= settled.resident + slack
    third = max(1, len(later) // 3)
    assert median(s.seconds for s in later[-third:]) < 1.5 * median(s.seconds for s in later[:third])


def test_thirty_generations():
    assert_flat(soak(30, 5), slack=8 * MEBIBYTE)


@pytest.mark.full
def test_two_thousand_generations():
    assert_flat(soak(2000, 50), slack=16 * MEBIBYTE)
