"""State belongs to a model's parameters: who shares it, who does not, when it is valid, when it is freed."""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import SPARSE, TinyDiT, assert_same, calls, chipmunk, compiled, exactly, identical, run

TIMES = (900, 700, 500, 300)
PHASES = {0: ["refresh", "sparse", "sparse", "sparse"]}


def test_two_models_of_one_class_share_a_graph_but_no_state():
    models = [TinyDiT(seed=1), TinyDiT(seed=2)]
    alone = []
    for model in models:
        alone.append(run(compiled(model), calls(TIMES)))
    twins = [copy.deepcopy(model) for model in models]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = [chipmunk(model, options=SPARSE) for model in twins]
    mixed = [[], []]
    for call in calls(TIMES):
        for index, model in enumerate(ours):
            mixed[index] += run(model, [call])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert identical(mixed[0], alone[0]) and identical(mixed[1], alone[1])
    for model in ours:
        assert chipmunk_fx.summary(model).phases == PHASES


def test_two_compilations_of_one_model_keep_apart():
    model = TinyDiT()
    coarse = compiled(model, attention__density=0.05)
    fine = chipmunk(model, options=SPARSE | {"attention.density": 0.5})
    steps = calls(TIMES)
    alone = run(coarse, steps), run(fine, steps)
    for compilation in (coarse, fine):
        chipmunk_fx.reset(compilation)
    mixed = [[], []]
    for call in steps:
        mixed[0] += run(coarse, [call])
        mixed[1] += run(fine, [call])
    assert identical(mixed[0], alone[0]) and identical(mixed[1], alone[1])
    assert len(chipmunk_fx.summary(model).sites) == 2


def test_a_copy_of_the_model_begins_with_nothing():
    model = TinyDiT()
    ours = compiled(model)
    run(ours, calls(TIMES[:2]))
    twin = copy.deepcopy(model)
    theirs = chipmunk(twin, options=SPARSE)
    assert chipmunk_fx.summary(theirs).phases == {}
    run(theirs, calls(TIMES[2:]))
    run(ours, calls(TIMES[2:]))
    assert chipmunk_fx.summary(theirs).phases == {0: ["refresh", "sparse"]}
    assert chipmunk_fx.summary(ours).phases == PHASES


@pytest.mark.parametrize("named", [True, False])
def test_threads_on_one_model_do_not_mix(named: bool):
    """Nor without `generation`, where even the text is the same."""
    model = compiled(TinyDiT())
    seeds = range(2)
    alone = []
    for seed in seeds:
        with chipmunk_fx.generation(model, key=f"alone {seed}"):
            alone.append(run(model, calls(TIMES, seed=seed)))
    results: dict[int, list[torch.Tensor]] = {}
    barrier = threading.Barrier(len(seeds))

    def work(seed: int) -> None:
        with chipmunk_fx.generation(model, key=seed) if named else nullcontext():
            results[seed] = []
            for call in calls(TIMES, seed=seed):
                barrier.wait()
                results[seed] += run(model, [call])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(identical(results[seed], alone[seed]) for seed in seeds)
    assert all(chipmunk_fx.summary(model, key=seed if named else None).phases == PHASES for seed in seeds)


def test_a_thread_that_ended_leaves_its_buffers_to_the_next():
    model = compiled(TinyDiT())
    for seed in range(3):
        thread = threading.Thread(target=run, args=(model, calls(TIMES, seed=seed)))
        thread.start()
        thread.join()
    (session,) = registry.sessions(model)
    assert len(session.tracks) == 1 and chipmunk_fx.summary(model).phases == PHASES


def test_threads_on_models_that_share_a_graph():
    models = [TinyDiT(seed=seed) for seed in range(3)]
    expected = [run(model, calls(TIMES)) for model in models]
    first = exactly(models[0])
    run(first, calls(TIMES[:1]))  # the graph is there, its sparse variant is not
    options = {"attention.density": 1.0, "mlp.density": 1.0, "attention.random_density": 0.0, "mlp.random_density": 0.0}
    ours = [chipmunk(model, options=SPARSE | options) for model in models]
    results: dict[int, list[torch.Tensor]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            results[index] = run(ours[index], calls(TIMES))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for index in range(3):
        assert_same(results[index], expected[index])


def test_a_freed_model_frees_its_state():
    model = TinyDiT()
    ours = compiled(model)
    run(ours, calls(TIMES))
    (kept,) = registry.sessions(ours)
    sites = next(iter(kept.tracks[None].branches[0].caches.values()))
    (cell,) = sites.values()
    session, cache = weakref.ref(kept), weakref.ref(cell.tensors["lists"])
    del model, ours, kept, sites, cell
    gc.collect()
    assert session() is None and cache() is None


def test_a_freed_model_leaves_the_one_that_shares_its_graph():
    first, second = TinyDiT(seed=1), TinyDiT(seed=2)
    ours = exactly(first)
    run(ours, calls(TIMES[:2]))
    del ours, first
    gc.collect()
    steps = calls(TIMES)
    theirs = chipmunk(second, options=SPARSE | {"attention.density": 1.0, "mlp.density": 1.0})
    assert_same(run(theirs, steps), run(second, steps))


def test_weights_changed_in_place_serve_the_next_generation():
    model = TinyDiT()
    ours = exactly(model)
    run(ours, calls(TIMES))
    before = ours.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    changed = run(model, calls(TIMES))
    model.load_state_dict(TinyDiT(seed=5).state_dict())
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert not identical(changed, run(model, calls(TIMES)))
    assert before.keys() == ours.state_dict().keys()
    assert chipmunk_fx.summary(ours).phases == PHASES


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_loaded_between_generations():
    model = TinyDiT()
    ours = exactly(model)
    run(ours, calls(TIMES))
    block = model.blocks[0]
    block.qkv, block.fc1 = LowRank(block.qkv), LowRank(block.fc1)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES
    block.qkv, block.fc1 = block.qkv.base, block.fc1.base
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES


@pytest.mark.parametrize("name", ["qkv", "fc1"])
def test_a_parameter_replaced_in_a_generation(name: str):
    """Its caches are gone with it, whichever of the sites it belongs to."""
    model = TinyDiT(depth=2)
    ours = exactly(model)
    steps = calls(TIMES)
    run(ours, steps[:2])
    layer = getattr(model.blocks[1], name)
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
    assert_same(run(ours, steps[2:]), run(model, steps[2:]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


def test_moving_the_model_keeps_it_right():
    model = TinyDiT()
    ours = exactly(model)
    run(ours, calls(TIMES))
    model.to("cpu")
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES


def marks(compile_model) -> set:
    """(module, attribute) of everything that changes in a model when it is compiled and called."""
    model = TinyDiT()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    run(compile_model(model), calls(TIMES))
    return {
        (name, key)
        for name, module in model.named_modules()
        for key in vars(module).keys() | before[name].keys()
        if vars(module).get(key) is not before[name].get(key)
    }


def test_the_users_model_is_not_touched():
    forward, sdpa = TinyDiT.forward, F.scaled_dot_product_attention
    assert marks(compiled) == marks(lambda model: torch.compile(model, backend="eager"))
    assert TinyDiT.forward is forward and F.scaled_dot_product_attention is sdpa
