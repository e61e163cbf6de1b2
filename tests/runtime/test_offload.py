"""Caches in host memory: the same results, what lies where, and how little of them is on the device."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.config import patch
from torch._inductor.utils import run_and_get_code

import chipmunk_fx
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.summary import Summary
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.state.slots import Slot
from chipmunk_fx.state.store import CacheOutOfMemory, Place, Store, allocate
from tests.runtime.models import TinyDiT, calls, compiled, exactly, identical, run, words

TIMES = (900, 700, 500, 300)


def results(depth: int = 3, **options: Any) -> tuple[list[torch.Tensor], Summary]:
    model = compiled(TinyDiT(depth), **options)
    done = [out for seed in range(2) for out in run(model, calls(TIMES, [words(1), words(2)], seed=seed))]
    return done, chipmunk_fx.summary(model)


@pytest.fixture(scope="module")
def on_device() -> tuple[list[torch.Tensor], Summary]:
    return results()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_all_caches_on_the_host_change_no_bit(on_device, lowering: str):
    expected, beside = on_device if lowering == "eager" else results(lowering="inductor")
    with patch(fx_graph_cache=False):  # whose graphs come without their code
        (done, summary), code = run_and_get_code(results, memory__offload="all", lowering=lowering)
    assert identical(done, expected)
    assert bool(code) is (lowering == "inductor") and not [names for names in _buffers(code) if "buf" in names], (
        "copied"
    )
    assert {s.place for s in summary.sites} == {"host"} and all("host memory" in s.reason for s in summary.sites)
    assert summary.cache_bytes == summary.host_bytes == beside.cache_bytes > 0
    assert summary.phases == beside.phases and summary.flops_ratio == beside.flops_ratio
    assert "in host memory by way of" in str(summary)


def _buffers(code: list[str]) -> Iterator[str]:
    """What generated code fetches and stores, and where to, in the order of the operators' arguments."""
    for call in re.findall(r"cache_(?:fetch|store)\.default\((.*)\)", "\n".join(code)):
        yield from re.findall(r"\[([^]]*)\]", call)


def test_lists_that_refreshes_keep_come_back_from_the_host():
    options: dict[str, Any] = {"attention__renew_lists": False, "schedule__refresh_every": 2}
    expected, beside = results(**options)
    done, summary = results(memory__offload="all", **options)
    assert identical(done, expected) and not identical(done, results(schedule__refresh_every=2)[0])
    assert summary.listed == beside.listed == (0,)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_what_does_not_fit_goes_to_the_host(on_device, part: float):
    expected, beside = on_device
    budget = part * beside.cache_bytes
    done, summary = results(memory__offload="auto", memory__budget_gb=budget / 1e9, schedule__branches=2)
    assert identical(done, expected)
    assert summary.cache_bytes - summary.host_bytes <= budget
    places = Counter((s.kind, s.place) for s in summary.sites)
    assert {s.status for s in summary.sites} == {"rewritten"}
    assert places["mlp", "device"] == {0.0: 0, 0.5: places["mlp", "device"], 1.0: 3}[part]
    assert places["mlp", "host"] == 3 or places["attention", "host"] == 0  # MLP sites give way first


def test_buffers_on_the_device_are_under_two_sites():
    for depth in (3, 6):
        _, summary = results(depth, memory__offload="all", mlp__enabled=False)
        sites = [s.cache_bytes / 2 for s in summary.sites if s.status == "rewritten"]  # of one branch
        assert sites[0] < summary.staging_bytes < 2 * sites[0] and len(sites) == depth


@pytest.mark.parametrize("layers", [{"attention__layers": {"1": 0.5, "2": 0.9}}, {"mlp__layers": {"1": 0.5}}])
def test_sites_of_other_densities_have_other_buffers(layers: dict[str, Any]):
    expected, _ = results(**layers)
    done, summary = results(memory__offload="all", **layers)
    assert identical(done, expected) and not summary.fallbacks


def test_sites_of_other_densities_have_other_buffers_at_every_size():
    """Two densities that round to as many columns at the size that is compiled."""
    model = TinyDiT(3)
    layers = {"attention__density": 0.30, "attention__layers": {"1": 0.38, "2": 0.38}, "mlp__enabled": False}
    ours, other = (compiled(model, memory__offload=where, **layers) for where in ("all", "none"))
    for side in (12, 10, 24):
        assert identical(run(ours, calls(TIMES, side=side)), run(other, calls(TIMES, side=side)))
        assert not chipmunk_fx.summary(ours).fallbacks


@pytest.mark.parametrize("depth", [3, 4])
def test_neighbours_of_a_site_without_memory_do_not_overwrite_each_other(depth: int, monkeypatch: pytest.MonkeyPatch):
    def failing(offload: str) -> tuple[list[torch.Tensor], list[str]]:
        asked = 0

        def make(self: Store, slots: Any, place: Place) -> Any:
            nonlocal asked
            asked += any(slot.name == "rest" for slot in slots) and place.on_host is (offload == "all")
            if asked == 2:  # the second site's
                raise CacheOutOfMemory("none left")
            return whole(self, slots, place)

        monkeypatch.setattr(Store, "make", make)
        model = compiled(TinyDiT(depth), memory__offload=offload, mlp__enabled=False)
        done = run(model, calls(TIMES))
        return done, [site.status for site in chipmunk_fx.summary(model).sites if site.kind == "attention"]

    whole = Store.make
    (expected, on_device), (done, on_host) = failing("none"), failing("all")
    assert on_host == on_device == ["rewritten", "dense", *["rewritten"] * (depth - 2)]
    assert identical(done, expected)


def test_the_next_site_is_fetched_while_one_computes_and_its_lists_after():
    model = compiled(TinyDiT(4), memory__offload="all", mlp__enabled=False)
    run(model, calls(TIMES))
    (session,) = registry.sessions(model)
    graph = session.tracks[None].records[0].graph()
    from chipmunk_fx.graph.rewrite import rewrite

    nodes = rewrite(graph.capture, graph.plan, graph.config, Phase.SPARSE).graph.nodes
    order = [_told(n) for n in nodes if _is_ours(n)]
    assert all(_is_ours(n) for n in [n for n in nodes if n.op == "call_function"][:2])  # beside all else
    rest, lists, nothing = ("rest", "share"), ("lists",), ()
    # waits for what, of which lane; begins to copy what, to which lane
    at_first = [("cache_fetch", nothing, 0, rest, 0), ("cache_fetch", nothing, 0, lists, 2)]
    turns = [(0, 1), (1, 0), (0, 1)]
    assert order == [
        *at_first,
        *(
            step
            for lane, coming in turns
            for step in (
                ("cache_fetch", rest, lane, rest, coming),
                ("cache_fetch", lists, 2, nothing, 0),
                ("attention_sparse",),
                ("cache_fetch", nothing, 0, lists, 2),
            )
        ),
        ("cache_fetch", rest, 1, nothing, 0),
        ("cache_fetch", lists, 2, nothing, 0),
        ("attention_sparse",),
    ]
    nodes = rewrite(graph.capture, graph.plan, graph.config, Phase.REFRESH).graph.nodes
    stores = [n.kwargs["lane"] for n in nodes if _is_ours(n) and n.target._opname == "cache_store"]
    fetched = [len(n.args[1]) for n in nodes if _is_ours(n) and n.target._opname == "cache_fetch"]
    assert stores == [0, 2, 1, 2, 0, 2, 1, 2] and set(fetched) == {0}  # a refresh overwrites all, so nothing comes


def _told(node: Any) -> tuple[Any, ...]:
    name = node.target._opname
    if name != "cache_fetch":
        return (name,)
    ready, stage = (tuple(n.name.split("_")[-1] for n in node.args[i]) for i in (0, 2))
    return name, ready, node.kwargs["lane"], stage, node.kwargs["coming"]


def _is_ours(node: Any) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "chipmunk"


def test_explain_says_where_caches_will_lie():
    call = calls(TIMES)[0]
    options = {"gate": "off", "attention.dense_layers": 0, "mlp.dense_layers": 0, "memory.offload": "all"}
    report = chipmunk_fx.explain(TinyDiT(2), *call, config=options)
    assert all("host memory" in s.reason for s in report.sites) and len(report.sites) == 4
    assert any("in host memory" in note and "pass through" in note for note in report.notes)
    auto = chipmunk_fx.explain(TinyDiT(2), *call, config=options | {"memory.offload": "auto", "memory.budget_gb": 0.0})
    assert [s.reason for s in auto.sites] == [s.reason for s in report.sites]


def test_what_fits_on_neither_side_stays_dense(monkeypatch: pytest.MonkeyPatch):
    from chipmunk_fx.runtime import placement

    monkeypatch.setattr(placement, "_host_memory", lambda: 0)
    call = calls(TIMES)[0]
    options = {"gate": "off", "attention.dense_layers": 0, "mlp.dense_layers": 0, "memory.offload": "all"}
    report = chipmunk_fx.explain(TinyDiT(2), *call, config=options)
    assert {s.status for s in report.sites} == {"dense"}
    assert all("half of the host's free memory" in s.reason for s in report.sites)


def test_a_site_too_many_for_the_host_stays_dense_and_not_every_other_call(monkeypatch: pytest.MonkeyPatch):
    """Where caches just fit, memory that goes while compiling would leave a branch without any."""
    from chipmunk_fx.runtime import placement

    options: dict[str, Any] = {"memory__offload": "all", "mlp__enabled": False, "schedule__branches": 2}
    needed, free = results(4, **options)[1].host_bytes, 2.04
    model = compiled(TinyDiT(4), **options)

    def left() -> int:
        return int(free * needed) - sum(session.account().host for session in registry.sessions(model))

    monkeypatch.setattr(placement, "_host_memory", left)
    first, *others = calls(TIMES, [words(1), words(2)])
    run(model, [first])
    free = 1.98
    run(model, others)
    summary = chipmunk_fx.summary(model)
    sites = [s for s in summary.sites if s.kind == "attention"]
    assert [s.status for s in sites] == ["rewritten"] * 3 + ["dense"] and "half of the host" in sites[-1].reason
    assert not summary.fallbacks and summary.host_bytes == 0.75 * needed


def test_pieces_of_a_model_keep_their_caches_on_the_device():
    model = TinyDiT(2)
    torch._dynamo.reset()
    told = {"lowering": "eager", "gate": "off", "schedule.steps": 4, "schedule.branches": 1, "memory.offload": "all"}
    for block in model.blocks:
        block.compile(backend="chipmunk", options=told | {"attention.dense_layers": 0, "mlp.dense_layers": 0})
    run(model, calls(TIMES))
    summary = chipmunk_fx.summary(model)
    assert summary.cache_bytes > 0 == summary.host_bytes


def test_dynamic_shapes_and_offload():
    model = TinyDiT(2)
    ours = exactly(model, memory__offload="all", lowering="inductor")
    for count in (8, 5, 11):
        steps = calls(TIMES, [words(count, count)])
        for got, want in zip(run(ours, steps), run(model, steps), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "sparse", "sparse"]}


def test_a_parameter_replaced_in_a_generation_begins_anew_on_the_host_too():
    model = TinyDiT(2)
    ours = exactly(model, memory__offload="all")
    steps = calls(TIMES)
    run(ours, steps[:2])
    layer = model.blocks[1].fc1
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
    for got, want in zip(run(ours, steps[2:]), run(model, steps[2:]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs streams")
def test_calls_on_other_streams_come_one_after_the_other():
    def results(streams: list[Any]) -> list[torch.Tensor]:
        model = compiled(TinyDiT(4).cuda(), memory__offload="all")
        inputs = {key: [[t.cuda() for t in call] for call in calls(TIMES, seed=seed)] for seed, key in enumerate("ab")}
        done = []
        torch.cuda.synchronize()
        for turn in range(len(TIMES)):
            for key, stream in zip("ab", streams, strict=True):
                with torch.cuda.stream(stream), chipmunk_fx.generation(model, key=key):
                    torch.cuda._sleep(20_000_000)  # this stream's work begins long after it was given
                    done += run(model, inputs[key][turn : turn + 1])
        torch.cuda.synchronize()
        return done

    one = torch.cuda.Stream()
    assert identical(results([torch.cuda.Stream(), torch.cuda.Stream()]), results([one, one]))


def test_host_buffers_are_pooled():
    made: list[Slot] = []

    def counting(slot: Slot, place: Place) -> torch.Tensor:
        made.append(slot)
        return allocate(slot, place)

    store, slots = Store(counting), [Slot("rest", (4, 8), torch.float32), Slot("lists", (4,), torch.int32)]
    place = Place(torch.device("cpu"), on_host=True)
    first = store.make(slots, place)
    store.spare(first)
    second = store.make(slots, place)
    assert [second.tensors[n] is first.tensors[n] for n in first.tensors] == [True, True] and made == slots
    store.spare(second)
    store.make([Slot("rest", (2, 8), torch.float32)], place)  # another shape: what no one asks for is let go
    assert store.make(slots, place).tensors["rest"] is not first.tensors["rest"]


@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("named", [False, True])
def test_nothing_is_allocated_after_the_first_generation(offload: str, named: bool):
    model = compiled(TinyDiT(2), memory__offload=offload)
    made: list[Slot] = []

    def counting(slot: Slot, place: Place) -> torch.Tensor:
        made.append(slot)
        return allocate(slot, place)

    def generate(seed: int) -> None:
        inputs = calls(TIMES, [words(1), words(2)], seed=seed)
        if named:
            with chipmunk_fx.generation(model):
                run(model, inputs)
        else:
            run(model, inputs)

    generate(0)
    (session,) = registry.sessions(model)
    session.store.allocate = counting
    for seed in range(1, 4):
        generate(seed)
    assert made == []
    run(model, calls(TIMES, side=24))
    assert len(made) > 0
