"""Refreshes that keep the lists of columns which attention chose at the first one (attention.renew_lists)."""

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.runtime import registry, renewal
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.phase import Phase
from tests.runtime.models import TinyDiT, assert_same, calls, compiled, identical, run, words
from tests.runtime.test_masks import Masked, steps

TIMES = (900, 700, 500, 300, 100)
PHASES = {0: ["refresh", "sparse", "refresh", "sparse", "refresh"]}


def lists(model: Any) -> list[Tensor]:
    """What every attention of the model's first branch has listed."""
    (session,) = registry.sessions(model)
    caches = session.tracks[None].branches[0].caches.values()
    return [cell.tensors["lists"].clone() for sites in caches for cell in sites.values() if "rest" in cell.tensors]


def listed(model: Any, inputs: Any) -> list[list[Tensor]]:
    """The lists after every call."""
    return [run(model, [call]) and lists(model) for call in inputs]


def keeping(model: TinyDiT, **options: Any) -> Any:
    return compiled(model, attention__renew_lists=False, schedule__refresh_every=2, **options)


def test_lists_are_chosen_once_a_generation():
    inputs, renewing = calls(TIMES), compiled(TinyDiT(depth=2), schedule__refresh_every=2)
    first, *_, last = listed(renewing, inputs)
    assert not any(map(torch.equal, first, last)) and chipmunk_fx.summary(renewing).listed == ()
    ours = keeping(TinyDiT(depth=2))
    kept = listed(ours, inputs)
    assert all(identical(later, kept[0]) for later in kept) and identical(kept[0], first)
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == PHASES and summary.listed == (0,)
    assert "lists of attention chosen at steps 0" in str(summary)
    assert summary.flops_ratio < chipmunk_fx.summary(renewing).flops_ratio
    chipmunk_fx.reset(ours)
    assert not any(map(torch.equal, listed(ours, calls(TIMES[:1], seed=5))[0], first)), "a new generation"


@pytest.mark.parametrize("recorded", [False, True])
def test_one_graph_serves_refreshes_of_both_kinds(recorded: bool, monkeypatch: pytest.MonkeyPatch):
    """It is told on the host which is due; CUDA graphs, which ask no host, take two."""
    built, build = [], Variants._build
    monkeypatch.setattr(renewal, "records_graphs", lambda config: recorded)
    monkeypatch.setattr(Variants, "_build", lambda self, phase, *more: built.append(phase) or build(self, phase, *more))
    kept = listed(ours := keeping(TinyDiT(depth=2)), calls(TIMES))
    assert built.count(Phase.REFRESH) == 1 + recorded and built.count(Phase.SPARSE) == 1
    assert all(identical(later, kept[0]) for later in kept) and chipmunk_fx.summary(ours).listed == (0,)


def test_a_refresh_is_dense_all_the_same():
    ours, dense = run(keeping(TinyDiT(depth=2)), calls(TIMES)), run(TinyDiT(depth=2), calls(TIMES))
    assert_same(ours[::2], dense[::2])
    assert not torch.allclose(ours[1], dense[1], atol=1e-5)


def test_branches_have_lists_of_their_own():
    texts = [words(1), words(2)]
    ours = keeping(TinyDiT(depth=2))
    run(ours, calls(TIMES, texts))
    assert chipmunk_fx.summary(ours).phases == {0: PHASES[0], 1: PHASES[0]}
    (session,) = registry.sessions(ours)
    records = session.tracks[None].records
    assert [(r.step, r.branch) for r in records if r.phase == "refresh" and r.renewed] == [(0, 0), (0, 1)]


def test_caches_that_are_new_have_no_lists_to_keep():
    """A parameter replaced between two steps: its site begins anew."""
    model = TinyDiT()
    ours, inputs = keeping(model), calls(TIMES)
    run(ours, inputs[:2])
    qkv = model.blocks[0].qkv
    qkv.weight = torch.nn.Parameter(qkv.weight.detach() + 0.1)
    got = run(ours, inputs[2:])
    assert_same(got[:1], run(model, inputs[2:3]))
    assert not any((rows < 0).any() or (rows.diff() <= 0).any() for rows in lists(ours))


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.full), True])
def test_with_inductor(dynamic: bool | None):
    torch._dynamo.reset()
    options = {"attention.dense_layers": 0, "mlp.enabled": False, "gate": "off", "attention.group_rows": 16}
    options |= {"attention.renew_lists": False, "schedule.refresh_every": 2}
    ours = torch.compile(TinyDiT(), backend="chipmunk", dynamic=dynamic, options=options)
    for side in (16, 24):
        got, want = run(ours, calls(TIMES, side=side)), run(TinyDiT(), calls(TIMES, side=side))
        assert_same(got[::2], want[::2])
        assert chipmunk_fx.summary(ours).phases == PHASES and chipmunk_fx.summary(ours).listed == (0,)


def test_other_padding_needs_other_lists():
    ours = compiled(Masked(), attention__renew_lists=False, schedule__refresh_every=2)
    run(ours, [*steps((5,))[:2], *steps((7,))[2:]])
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["refresh", "sparse", "refresh", "sparse"]} and summary.listed == ()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper: refreshes are faster where their lists are chosen beforehand."""
    monkeypatch.setattr(renewal, "refreshes_in_parts", lambda *_: True)


def weighing(model: TinyDiT, **options: Any) -> Any:
    return compiled(model, schedule__refresh_every=2, attention__random_density=0.0, mlp__enabled=False, **options)


def denominators(model: Any) -> list[Tensor]:
    (session,) = registry.sessions(model)
    caches = session.tracks[None].branches[0].caches.values()
    return [cell.tensors["lse"] for sites in caches for cell in sites.values() if "lse" in cell.tensors]


def test_masses_are_weighed_by_the_refresh_before(in_parts: None):
    """Rows whose denominators were much larger then as good as do not count."""
    plain, ours = weighing(TinyDiT(depth=2)), weighing(TinyDiT(depth=2))
    assert identical(*(listed(model, calls(TIMES[:2]))[0] for model in (plain, ours)))
    kept = denominators(ours)
    assert len(kept) == 2 and all(lse.isfinite().all() for lse in kept)
    for lse in kept:
        lse[..., ::2] += 60
    for model in (plain, ours):
        run(model, calls(TIMES[2:3]))
    assert not any(map(torch.equal, lists(plain), lists(ours)))
    assert_same(denominators(ours)[:1], denominators(plain)[:1])


def test_the_first_refresh_of_a_generation_uses_none_before(in_parts: None):
    ours = weighing(TinyDiT(depth=2))
    first = listed(ours, calls(TIMES))[0]
    for lse in denominators(ours):
        lse.fill_(torch.nan)
    chipmunk_fx.reset(ours)
    assert identical(listed(ours, calls(TIMES[:1]))[0], first)


def test_what_masses_are_weighed_by_comes_back_from_the_host(in_parts: None):
    there, here = weighing(TinyDiT(depth=3), memory__offload="all"), weighing(TinyDiT(depth=3))
    assert identical(run(there, calls(TIMES)), run(here, calls(TIMES)))
    assert identical(lists(there), lists(here)) and identical(denominators(there), denominators(here))
    assert chipmunk_fx.summary(there).host_bytes == chipmunk_fx.summary(here).cache_bytes > 0


def test_recorded_graphs_weigh_by_no_refresh_before(in_parts: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(renewal, "records_graphs", lambda config: True)
    ours = weighing(TinyDiT())
    run(ours, calls(TIMES))
    assert not denominators(ours) and chipmunk_fx.summary(ours).phases == PHASES
