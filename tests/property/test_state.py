"""Random lives of one compiled model; every output is that of a fresh model that was given only its own generation."""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.session import Session
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.state.slots import Slot
from chipmunk_fx.state.store import Place, allocate
from tests.runtime.models import SPARSE, TinyDiT, chipmunk, noise, one_thread, words

OPTIONS = SPARSE | {"attention.random_density": 0.05, "schedule.refresh_every": 4}
TIMES = tuple(range(900, 0, -70))
KEYS = st.sampled_from([None, "a", "b"])
SIDES = st.sampled_from([16, 16, 24])
BRANCHES = st.integers(1, 2)
WORDS = st.sampled_from([8, 8, 5])
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class Tripped(RuntimeError):
    """The exception that ends a call half-way."""


class Wire(nn.Module):
    """x -> x, or an exception while it is `tight`."""

    tight = False


@torch.library.custom_op("chipmunk_tests::tripwire", mutates_args=())
def tripwire(x: Tensor) -> Tensor:
    if Wire.tight:
        raise Tripped("half-way")
    return x.clone()


tripwire.register_fake(torch.empty_like)


class Wired(nn.Module):
    """A block behind the wire."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(tripwire(x))


def model() -> TinyDiT:
    made = TinyDiT(depth=2)
    made.blocks[1] = Wired(made.blocks[1])
    return made


class Refusing:
    """No memory for so many slots of this name: idle generations give theirs first, then sites go dense."""

    def __init__(self, name: str, times: int) -> None:
        self.name, self.left = name, times

    def __call__(self, slot: Slot, place: Place) -> Tensor:
        if slot.name == self.name and self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("injected")
        return allocate(slot, place)


@dataclass
class Life:
    """A generation: its twin is a fresh model that sees nothing else."""

    side: int
    count: int
    seed: int
    twin: Any
    step: int = 0
    texts: list[Tensor] = field(default_factory=list)

    def inputs(self, branch: int, moved: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        latents = noise(self.seed, self.side) + (0.1 * self.step + moved) * noise(self.seed + 1, self.side)
        return latents, torch.full((1,), float(TIMES[self.step])), self.texts[branch]


def session_of(compiled: Any) -> Session | None:
    return next(iter(registry.sessions(compiled)), None)


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = model()
        self.ours = chipmunk(self.model, options=OPTIONS)
        self.lives: dict[Any, Life] = {}
        self.seeds = 0

    @initialize()
    def start(self) -> None:
        Wire.tight = False

    @rule(key=KEYS, side=SIDES, count=WORDS)
    def begin(self, key: Any, side: int, count: int) -> None:
        self.seeds += 10
        life = Life(side, count, self.seeds, self.fresh())
        life.texts = [words(self.seeds + b, count if b == 0 else 8) for b in range(2)]
        self.lives[key] = life

    @precondition(lambda self: self.lives)
    @rule(key=KEYS, branches=BRANCHES)
    def step(self, key: Any, branches: int) -> None:
        """Guidance may start or stop at any step."""
        if life := self.going(key):
            for branch in range(branches):
                self.same(key, life, life.inputs(branch))
            life.step += 1

    @precondition(lambda self: self.lives)
    @rule(key=KEYS, steps=st.integers(2, 5))
    def walk(self, key: Any, steps: int) -> None:
        for _ in range(steps):
            self.step(key, 1)

    @precondition(lambda self: self.lives)
    @rule(key=KEYS)
    def second_order(self, key: Any) -> None:
        """Two evaluations at one timestep."""
        if life := self.going(key):
            self.same(key, life, life.inputs(0))
            self.same(key, life, life.inputs(0, moved=0.05))
            life.step += 1

    @precondition(lambda self: self.lives)
    @rule(key=KEYS, branch=st.integers(0, 1))
    def abort(self, key: Any, branch: int) -> None:
        """An exception half-way through the blocks; the sampler goes on with the next step."""
        if life := self.going(key):
            self.trip(self.ours, key, life.inputs(branch))
            self.mirror()
            self.trip(self.twin_of(life), key, life.inputs(branch))
            life.step += 1

    @rule()
    def reset(self) -> None:
        if session_of(self.ours):
            chipmunk_fx.reset(self.ours)
            for life in self.lives.values():
                life.twin = self.fresh()

    @rule(name=st.sampled_from(["qkv", "fc1", "fc2", "proj"]))
    def change_weights_in_place(self, name: str) -> None:
        """Between generations, as an adapter that is fused or swapped."""
        self.lives.clear()
        with torch.no_grad():
            getattr(self.model.blocks[0], name).weight.mul_(1.05)

    @rule(block=st.integers(0, 1), name=st.sampled_from(["qkv", "fc1"]))
    def replace_a_parameter(self, block: int, name: str) -> None:
        """In the middle of generations, as hooks do."""
        for compiled in (self.ours, *(life.twin for life in self.lives.values())):
            found = compiled._orig_mod.blocks[block]
            layer = getattr(found.block if block else found, name)
            layer.weight = nn.Parameter(layer.weight.detach() * 1.02)

    @rule(name=st.sampled_from(["rest", "hidden", "lists"]), times=st.integers(1, 5))
    def run_out_of_memory(self, name: str, times: int) -> None:
        if session := session_of(self.ours):
            session.store.allocate = Refusing(name, times)

    @precondition(lambda self: {"a", "b"} <= self.lives.keys())
    @rule()
    def threads(self) -> None:
        """With memory for both: whom it fails would depend on who comes first."""
        if session := session_of(self.ours):
            session.store.allocate = allocate
        pairs = [(key, life) for key in ("a", "b") if (life := self.going(key))]
        results: dict[Any, Tensor] = {}

        def work(key: Any, life: Life) -> None:
            results[key] = self.call(self.ours, key, life.inputs(0))

        together = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
        self.mirror()
        for key, life in pairs:
            self.compare(results[key], key, life, life.inputs(0))
            life.step += 1

    @rule(branches=BRANCHES, side=SIDES)
    def unnamed(self, branches: int, side: int) -> None:
        """A generation in a block without a key, from the first step to the third."""
        self.seeds += 10
        life = Life(side, 8, self.seeds, self.fresh())
        life.texts = [words(self.seeds + b) for b in range(2)]
        with chipmunk_fx.generation(self.ours):
            for _ in range(3):
                for branch in range(branches):
                    self.same(None, life, life.inputs(branch))
                life.step += 1

    def going(self, key: Any) -> Life | None:
        life = self.lives.get(key)
        return life if life and life.step < len(TIMES) else None

    def fresh(self) -> Any:
        """A model of its own with today's weights, on which the same sites are dense."""
        twin = chipmunk(copy.deepcopy(self.model), options=OPTIONS)
        if self.exempt:
            for time in (900.0, 800.0):  # models that are called once and never again look like hooks at work
                self.call(twin, "earlier", (noise(1), torch.full((1,), time), words(1)))
            self.excuse(twin)
        return twin

    @staticmethod
    @torch.no_grad()
    def call(compiled: Any, key: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        if key is None:
            return compiled(*inputs)
        with chipmunk_fx.generation(compiled, key=key):
            return compiled(*inputs)

    def trip(self, compiled: Any, key: Any, inputs: tuple[Tensor, ...]) -> None:
        Wire.tight = True
        try:
            with pytest.raises(Tripped):
                self.call(compiled, key, inputs)
        finally:
            Wire.tight = False

    def same(self, key: Any, life: Life, inputs: tuple[Tensor, ...]) -> None:
        got = self.call(self.ours, key, inputs)
        self.mirror()
        self.compare(got, key, life, inputs)

    def compare(self, got: Tensor, key: Any, life: Life, inputs: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(got, self.call(self.twin_of(life), key, inputs), **TOLERANCE)

    def twin_of(self, life: Life) -> Any:
        """The life's twin, on which the sites are dense that found no memory until now."""
        if self.exempt and session_of(life.twin) is None:
            life.twin = self.fresh()
        elif self.exempt:
            self.excuse(life.twin)
        return life.twin

    @property
    def exempt(self) -> set[tuple[str, int]]:
        """(owner's name, ordinal) of sites that found no memory, as long as they have the same owner."""
        session = session_of(self.ours)
        found = session.faults._sites.items() if session else ()
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {(names[id(p)], ordinal) for p, sites in found for ordinal in sites if id(p) in names}

    def mirror(self) -> None:
        """Generations that lost their caches to others lose them in their twins too."""
        session = session_of(self.ours)
        assert session is not None
        for key, life in self.lives.items():
            track, twin = session.tracks.get(key), session_of(life.twin)
            if twin is not None and track is not None and not track.branches:
                twin._free(twin.tracks.values())

    def excuse(self, twin: Any) -> None:
        session, parameters = session_of(twin), dict(twin._orig_mod.named_parameters())
        assert session is not None
        for record in next(iter(session.tracks.values())).records[:1]:
            for site in record.graph().plan.sites:
                for name, ordinal in self.exempt:
                    if ordinal == site.ordinal and self.owner(record.graph(), site) == name:
                        session.faults.exempt(parameters[name], site, "as its twin")

    @staticmethod
    def owner(graph: Any, site: Any) -> str:
        return graph.capture.inputs[site.owner].name


def test_the_sequences_are_sparse_and_take_every_turn():
    """What random sequences may leave out, once by hand."""
    with one_thread():
        torch._dynamo.reset()
        lives = Lives()
        lives.begin("a", 16, 8)
        lives.begin("b", 24, 5)
        for _ in range(2):
            lives.step("a", 2)
            lives.threads()
        lives.abort("a", 0)
        lives.second_order("b")
        lives.run_out_of_memory("hidden", 3)
        lives.unnamed(2, 16)
        lives.replace_a_parameter(1, "qkv")
        lives.walk("a", 3)
        lives.walk("b", 2)
        session = session_of(lives.ours)
        assert session is not None and lives.exempt == {("blocks.0.fc1.weight", 0)}
        records = [record for track in session.tracks.values() for record in track.records]
        assert {record.phase for record in records} >= {Phase.REFRESH, Phase.SPARSE}
        sites = chipmunk_fx.summary(lives.ours, key="a").sites
        assert all(site.density < 0.5 for site in sites if site.status == "rewritten")
        lives.change_weights_in_place("fc2")
        lives.begin(None, 16, 8)
        lives.walk(None, 4)
        lives.reset()
        lives.walk(None, 4)


def run_sequences(count: int, steps: int) -> None:
    torch._dynamo.reset()
    with one_thread():
        run_state_machine_as_test(
            Lives,
            settings=settings(
                max_examples=count,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_ten_sequences():
    run_sequences(10, 20)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_five_hundred_sequences():
    run_sequences(500, 30)
