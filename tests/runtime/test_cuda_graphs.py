"""What CUDA graphs need of a rewritten graph: every cache is an input at a fixed address, which alone may be written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import chipmunk_fx
from chipmunk_fx.config import Config
from chipmunk_fx.runtime import registry, variants
from chipmunk_fx.schedule.phase import Phase
from tests.runtime.models import EXACT, TinyDiT, assert_same, calls, exactly, identical, run, words

TIMES = (900, 700, 500, 300)
# Else kernels are chosen by timing, and sum in another order.
SETTLED = torch._inductor.config.patch(deterministic=True)


@dataclass(frozen=True)
class Compiled:
    """What Inductor was told of one graph, and found in it."""

    inputs: int
    static: frozenset[int]
    mutated: frozenset[int]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """Every graph that our variants have Inductor compile."""
    found: list[Compiled] = []

    def inner(graph: Any, inputs: Sequence[Any], **settings: Any) -> Any:
        done = compile_fx_inner(graph, inputs, **settings)
        found.append(
            Compiled(len(inputs), frozenset(settings["static_input_idxs"]), frozenset(done.mutated_input_idxs))
        )
        return done

    def spied(*args: Any, **kwargs: Any) -> Any:
        return compile_fx(*args, **kwargs, inner_compile=inner)

    monkeypatch.setattr(variants, "compile_fx", spied)
    return found


def test_caches_are_static_inputs_and_nothing_else_is_written(seen: list[Compiled]):
    model = TinyDiT(depth=2)
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        ours = exactly(model, lowering="inductor", inductor__mode="reduce-overhead")
        assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    (session,) = registry.sessions(ours)
    graph = session.tracks[None].records[0].graph()
    own, state = len(graph.capture.inputs), len(graph.entries)
    assert len(seen) == 2  # a refresh and a sparse step
    for compiled in seen:
        assert compiled.inputs == own + state
        assert set(range(own, own + state)) <= compiled.static
        assert compiled.mutated and compiled.mutated <= set(range(own, own + state))
    user = [i for i, entry in enumerate(graph.capture.inputs) if not entry.is_parameter]
    assert not any(set(user) & compiled.static for compiled in seen)


def test_caches_keep_their_addresses_from_step_to_step_and_from_generation_to_generation():
    ours = exactly(TinyDiT(depth=2), inductor__mode="reduce-overhead")
    texts = [words(1), words(2)]
    addresses = []
    for seed in range(3):
        for call in range(0, 2 * len(TIMES), 2):
            run(ours, calls(TIMES, texts, seed=seed)[call : call + 2])
            (session,) = registry.sessions(ours)
            track = session.tracks[None]
            addresses.append([[t.data_ptr() for t in p.state] for p in track.prepared.values()])
        chipmunk_fx.reset(ours)
    caches = [[ptrs for (*ptrs,) in step] for step in addresses]
    kept = [[[p for p, e in zip(ptrs, _entries(session), strict=True) if e.role != "order" and e.role != "always"]
             for ptrs in step] for step in caches]  # fmt: skip
    assert all(step == kept[0] for step in kept) and len(kept[0]) == 2


def _entries(session: Any) -> Any:
    return session.tracks[None].records[0].graph().entries


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_mode_changes_no_bit(mode: str):
    model = TinyDiT()
    plain = run(exactly(model, lowering="inductor"), calls(TIMES))
    assert identical(run(exactly(model, lowering="inductor", inductor__mode=mode), calls(TIMES)), plain)


def recompiled(model: TinyDiT, steps: Sequence[Sequence[torch.Tensor]], **options: Any) -> Any:
    """Compiled a second time: torch.compile alone, too, may choose other kernels the first time than it keeps for later ones."""
    run(exactly(model, lowering="inductor", **options), steps)
    return exactly(model, lowering="inductor", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("offload", ["none", "all"])
@SETTLED
def test_recorded_graphs_change_no_bit(offload: str):
    torch._dynamo.utils.counters.clear()
    model = TinyDiT(depth=3).cuda()
    steps = [tuple(t.cuda() for t in call) for call in calls(TIMES, [words(1), words(2)])]
    plain = run(recompiled(model, steps, memory__offload=offload), steps)
    ours = recompiled(model, steps, inductor__mode="reduce-overhead", memory__offload=offload)
    for _ in range(3):
        assert identical([run(ours, [call])[0] for call in steps], plain)  # of which no call has overwritten any
        assert chipmunk_fx.summary(ours).phases == dict.fromkeys(range(2), ["refresh", *["sparse"] * 3])
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert skipped == 0 or offload == "all"  # caches on the host are no static inputs of a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@SETTLED
def test_blocks_compiled_one_by_one_record_graphs_of_their_own():
    """Every block is a call by itself, which must not take the place of what the one before has left."""
    model = TinyDiT(depth=3).cuda()
    steps = [tuple(t.cuda() for t in call) for call in calls(TIMES, [words(1), words(2)])]
    options = EXACT | {"lowering": "inductor", "schedule.steps": len(TIMES), "schedule.branches": 2}
    made = []
    for more in 2 * ({}, {"inductor.mode": "reduce-overhead"}):  # as `recompiled`
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="chipmunk", fullgraph=True, options=options | more)
        for _ in range(3):
            made.append([run(model, [call])[0] for call in steps])
            assert chipmunk_fx.summary(model).phases == dict.fromkeys(range(2), ["refresh", *["sparse"] * 3])
    settled = made[6:]
    assert len(settled) == 6 and all(identical(each, settled[0]) for each in settled)


def test_results_are_the_callers_to_keep():
    """What a call returns lies apart from where the graph left it, but for what the caller had given."""
    left, given = torch.ones(3), torch.ones(4)
    call = variants.owned(lambda *values: (left, values[1][:2], 7), [1])
    result, view, number = call(torch.ones(2), given)
    left.zero_()
    assert result.tolist() == [1, 1, 1] and view.data_ptr() == given.data_ptr() and number == 7


@pytest.mark.parametrize(("mode", "copied"), [("reduce-overhead", True), ("default", False)])
def test_results_are_copied_where_graphs_are_recorded(mode: str, copied: bool, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(variants, "owned", lambda compiled, given: made.append(given) or compiled)
    run(exactly(TinyDiT(), lowering="inductor", inductor__mode=mode), calls(TIMES[:1]))
    assert bool(made) == copied


@pytest.mark.parametrize("said", [False, True])
def test_what_no_option_says_of_recording_inductors_own_settings_do(said: bool):
    """TORCHINDUCTOR_CUDAGRAPHS=1, for one."""
    options = [{}, {"inductor.max_autotune": True}, {"inductor.mode": "default"}]
    with torch._inductor.config.patch({"triton.cudagraphs": said}):
        assert all(variants.records_graphs(Config.from_options(given)) == said for given in options)
        assert variants.records_graphs(Config.from_options({"inductor.mode": "reduce-overhead"}))
        for given in ({"inductor.triton.cudagraphs": False}, {"lowering": "eager"}):
            assert not variants.records_graphs(Config.from_options(given))


def test_phases_have_graphs_of_their_own():
    ours = exactly(TinyDiT())
    run(ours, calls(TIMES))
    (session,) = registry.sessions(ours)
    made = session.tracks[None].records[0].graph().variants._made
    refresh, sparse = (made[phase, True] for phase in (Phase.REFRESH, Phase.SPARSE))
    assert refresh is not sparse
