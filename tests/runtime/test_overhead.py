"""The runtime's own time a call: everything between Dynamo and the compiled graph, and nothing of either."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # last: a folder of ours has the name of a distribution

from chipmunk_fx.runtime import registry
from chipmunk_fx.schedule.phase import Phase
from tests.runtime.models import TinyDiT, calls, compiled, run

FIXED, A_SITE = 100e-6, 1e-6  # seconds, where a tensor of two numbers is made and copied in FILLED
FILLED = 3.5e-6
TRIES = 8


def own_times(depth: int, count: int = 200) -> list[tuple[float, float]]:
    """Seconds of each sparse call beside the graph, which returns at once, and how slow the machine was then."""
    ours = compiled(TinyDiT(depth), schedule__refresh_every=1000)
    run(ours, calls((990, 980)))
    (session,) = registry.sessions(ours)
    graph = session.tracks[None].records[-1].graph()
    seen: list[Any] = []
    whole = session.call
    session.call = lambda graph, values: seen.append(values) or whole(graph, values)  # pyright: ignore[reportAttributeAccessIssue]
    inputs = calls(range(970, 970 - count, -1))
    run(ours, inputs[:1])
    result = torch.zeros(1)
    graph.variants._made[Phase.SPARSE, True] = lambda *_: result
    spent = []
    places = [graph.plan.roles.latents, graph.plan.roles.timestep]
    for latents, timestep, _ in inputs[1:]:
        values = list(seen[0])
        for place, value in zip(places, (latents, timestep), strict=True):
            values[place] = value
        start = time.perf_counter()
        registry.session_of(values[graph.owner], session.config, graph.is_piece, pytest.fail)
        whole(graph, values)
        spent.append((time.perf_counter() - start, slowness()))
    assert {r.phase for r in session.tracks[None].records[-count + 1 :]} == {Phase.SPARSE}
    return spent


def slowness(count: int = 20) -> float:
    """How many times slower than that the machine is now (another process may share the core); 1 where it is faster."""
    pair = torch.zeros(2, dtype=torch.int64)
    start = time.perf_counter()
    for number in range(count):
        pair.copy_(torch.tensor([number, 1]))
    return max((time.perf_counter() - start) / count / FILLED, 1.0)


def measured(depth: int) -> tuple[float, float]:
    """(lower quartile of the seconds of a call, how slow the machine was at its quickest): what disturbs only adds."""
    spent, slower = (quantiles(found)[0] for found in zip(*own_times(depth), strict=True))
    return spent, slower


def least(depth: int) -> tuple[float, float]:
    """Of the first try that keeps to what is allowed, else of the best of all."""
    tries = []
    for _ in range(TRIES):
        spent, slower = measured(depth)
        tries.append((spent / slower, spent, slower))
        if tries[-1][0] < allowed(depth):
            break
    return min(tries)[1:]


def allowed(depth: int) -> float:
    return FIXED + A_SITE * 2 * depth


def test_a_call_costs_the_host_little():
    """In a process of its own, which earlier tests have left nothing in; again where the machine is busy."""
    depths = 1, 20
    words = [sys.executable, "-P", __file__, *map(str, depths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for depth, line in zip(depths, done.stdout.splitlines()[-len(depths) :], strict=True):
        spent, slower = map(float, line.split())
        print(f"{2 * depth} sites: {spent * 1e6:.0f} us a call on a machine {slower:.2f} times as slow as said")
        assert spent / slower < allowed(depth)


if __name__ == "__main__":
    with torch.no_grad():
        for given in sys.argv[1:]:
            print(*least(int(given)))
