"""Graphs of one model that take turns within a generation each keep and refresh what is theirs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import (
    SPARSE,
    Call,
    TinyDiT,
    assert_same,
    calls,
    chipmunk,
    compiled,
    exactly,
    run,
    words,
)

TIMES = range(1000, 880, -10)  # twelve steps
ODD = [step % 2 == 1 for step in range(len(TIMES))]


class Shifted(TinyDiT):
    """Tokens are moved on by `shift` before the blocks and back behind them, as `by` does: no result depends on it."""

    shift = 0

    def __init__(self, by: Callable[[Tensor, int], Tensor] = lambda x, shift: x.roll(shift, 1)) -> None:
        super().__init__(depth=2)
        back = _Moved(self, lambda x, shift: by(x, -shift))
        self.blocks = nn.ModuleList([_Moved(self, by), *self.blocks, back])


class _Moved(nn.Module):
    """By the model's `shift`."""

    def __init__(self, model: Any, by: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.of, self.by = [model], by  # a list: no submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.by(x, self.of[0].shift)


class Coarse(TinyDiT):
    """Computes half as many tokens a side where `large`."""

    large = False

    def __init__(self) -> None:
        super().__init__(depth=2)

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        if not self.large:
            return super().forward(latents, timestep, text)
        small = nn.functional.avg_pool2d(latents, 2)
        return nn.functional.interpolate(super().forward(small, timestep, text), scale_factor=2)


class Shared(TinyDiT):
    """One module in place of four blocks, of which `left_out` is called in none."""

    left_out: int | None = None

    def __init__(self) -> None:
        super().__init__(depth=1)
        block = self.blocks[0]
        self.blocks = nn.ModuleList([_Optional(self, number, block) for number in range(4)])


class _Optional(nn.Module):
    def __init__(self, model: Shared, number: int, block: nn.Module) -> None:
        super().__init__()
        self.of, self.number, self.block = [model], number, block

    def forward(self, x: Tensor) -> Tensor:
        return x if self.of[0].left_out == self.number else self.block(x)


def in_turns(ours: Any, name: str, values: Sequence[Any], inputs: Sequence[Call]) -> list[Tensor]:
    """Calls with the model's attribute `name` set to each of `values`."""
    results = []
    for value, call in zip(values, inputs, strict=True):
        setattr(registry.unwrap(ours), name, value)
        results += run(ours, [call])
    return results


def by_turn(phases: Sequence[str]) -> tuple[str, str]:
    """First letters of the phases of even steps, and of odd ones."""
    letters = "".join(phase[0] for phase in phases)
    return letters[::2], letters[1::2]


ALTERNATING = [
    (Shifted, "shift", [16 * odd for odd in ODD]),
    (Coarse, "large", ODD),
    (Shared, "left_out", [0 if odd else None for odd in ODD]),
]


@pytest.mark.parametrize(("kind", "name", "values"), ALTERNATING, ids=["shifted", "other sizes", "a block left out"])
def test_each_is_refreshed_when_it_is_due(kind: type[TinyDiT], name: str, values: list[Any]):
    ours = compiled(kind(), schedule__refresh_every=4)
    in_turns(ours, name, values, calls(TIMES))
    # steps 0, 4 and 8 are due, and the first call from then on of whom they are not
    assert by_turn(chipmunk_fx.summary(ours).phases[0]) == ("rsrsrs", "rsrsrs")


@pytest.mark.parametrize(("kind", "name", "values"), ALTERNATING, ids=["shifted", "other sizes", "a block left out"])
def test_density_one_is_dense(kind: type[TinyDiT], name: str, values: list[Any]):
    dense = in_turns(kind(), name, values, calls(TIMES))
    assert_same(in_turns(exactly(kind(), schedule__refresh_every=4), name, values, calls(TIMES)), dense)


@pytest.mark.parametrize(("kind", "name", "values"), ALTERNATING[:2], ids=["shifted", "other sizes"])
def test_a_graph_is_not_told_of_the_other(kind: type[TinyDiT], name: str, values: list[Any]):
    """Its results are those of calls without the other's, where no columns are drawn by the number of a step."""
    inputs, chosen = calls(TIMES), {"attention__random_density": 0.0, "mlp__random_density": 0.0}
    both = in_turns(compiled(kind(), schedule__refresh_every=100, **chosen), name, values, inputs)
    alone = compiled(kind(), schedule__refresh_every=100, **chosen)
    assert_same(both[2::2], in_turns(alone, name, values[::2], inputs[::2])[1:])


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "index": lambda x, shift: x[:, (torch.arange(72) - shift) % 72],
    "index_select": lambda x, shift: x.index_select(1, (torch.arange(72) - shift) % 72),
    "list": lambda x, shift: x[:, [(i - shift) % 72 for i in range(72)]],
    "constant": lambda x, shift: x[:, torch.tensor([(i - shift) % 72 for i in range(72)])],
    "split": lambda x, shift: torch.cat([x[:, 72 - shift % 72 :], x[:, : 72 - shift % 72]], 1),
    "narrow": lambda x, shift: torch.cat(
        [x.narrow(1, 72 - shift % 72, shift % 72), x.narrow(1, 0, 72 - shift % 72)], 1
    ),
    "padding": lambda x, shift: nn.functional.pad(x.mT, (shift % 72, 0), mode="circular")[..., :72].mT,
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_moves_them(way: str):
    ours = compiled(Shifted(WAYS[way]), schedule__refresh_every=100)
    in_turns(ours, "shift", [16 * odd for odd in ODD], calls(TIMES))
    assert by_turn(chipmunk_fx.summary(ours).phases[0]) == ("rsssss", "rsssss")


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "way", [lambda x, n: x.roll(n, 1), lambda x, n: x.roll(int(n / 2 * 2.0), 1)], ids=["int", "float"]
)
def test_by_a_number_that_is_an_input(way: Callable[[Tensor, Any], Tensor], dynamic: bool | None):
    class Told(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, shift: Any = 0) -> Tensor:
            self.shift = shift
            return super().forward(latents, timestep, text)

    model = Told()
    model.blocks.insert(0, _Moved(model, way))
    torch._dynamo.reset()
    ours = chipmunk(model, options=SPARSE | {"schedule.refresh_every": 100}, dynamic=dynamic)
    with torch.no_grad():
        for step, call in enumerate(calls(TIMES)):
            ours(*call, 24 if step % 2 else 16)
    phases = "".join(phase[0] for phase in chipmunk_fx.summary(ours).phases[0])
    assert phases.startswith("rr") and phases.endswith("ssssss")


def test_a_number_that_moves_nothing_is_not_asked_for():
    """A dynamic step index: each call is as prepared as the one before."""

    class Indexed(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, index: int = 0) -> Tensor:
            return super().forward(latents + 0.01 * index, timestep, text)

    torch._dynamo.reset()
    ours = chipmunk(Indexed(), options=SPARSE, dynamic=True)
    with torch.no_grad():
        for step, call in enumerate(calls(TIMES)):
            ours(*call, 40 + step)
    (session,) = registry.sessions(ours)
    assert len(session.tracks[None].prepared) == 1
    assert "".join(phase[0] for phase in chipmunk_fx.summary(ours).phases[0]) == "rsssssssssrs"


def test_tokens_that_python_moves_are_as_good_where_they_lie():
    """A sparse step among moved tokens is as near to dense as one where nothing was moved."""
    inputs = calls(TIMES)
    dense = run(TinyDiT(depth=2), inputs)
    still, moved = (
        in_turns(compiled(Shifted(), schedule__refresh_every=100), "shift", shifts, inputs)
        for shifts in ([0] * len(TIMES), [16 * odd for odd in ODD])
    )
    off = [max((a - b).abs().max().item() for a, b in zip(got[2:], dense[2:], strict=True)) for got in (still, moved)]
    assert 0 < off[1] < 1.5 * off[0]


def test_of_many_sizes_the_newest_are_kept():
    """A context that grows with every step, in one branch."""
    ours = compiled(TinyDiT(), schedule__branches=1)
    for step, (latents, timestep, _) in enumerate(calls(TIMES)):
        run(ours, [(latents, timestep, words(count=8 + step))])
    (session,) = registry.sessions(ours)
    (branch,) = session.tracks[None].branches.values()
    assert sum(len(cells) for cells in branch.caches.values()) == 2 * 4


@pytest.mark.parametrize("skipped", [(), (4, 7)])
def test_sizes_of_earlier_generations_are_given_up(skipped: tuple[int, ...]):
    """Texts of other lengths: caches are as large after three generations as after the first."""
    ours = compiled(TinyDiT(), schedule__skip_steps=skipped or None)
    held = []
    for count in (8, 24, 8, 16):
        run(ours, calls(TIMES, [words(count=count)]))
        (session,) = registry.sessions(ours)
        (branch,) = session.tracks[None].branches.values()
        held.append(sum(len(cells) for cells in branch.caches.values()))
        assert session.held == session.account()
    assert len(set(held)) == 1


def test_caches_that_every_call_makes_anew_are_remarked_on(caplog: pytest.LogCaptureFixture):
    model = Shifted()
    ours = exactly(model)
    for model.shift, call in enumerate(calls(TIMES)):
        assert_same(run(ours, [call]), run(model, [call]))
    assert caplog.text.count("call after call is a refresh") == 1
    assert set(chipmunk_fx.summary(ours).phases[0]) == {"refresh"}


@pytest.mark.parametrize("asked", [{"refresh_every": 1}, {"refresh_steps": [*range(12)]}], ids=str)
def test_refreshes_that_are_asked_for_are_not(asked: dict[str, Any], caplog: pytest.LogCaptureFixture):
    ours = exactly(TinyDiT(), **{f"schedule__{name}": value for name, value in asked.items()})
    for _ in range(2):
        run(ours, calls(TIMES))
    assert set(chipmunk_fx.summary(ours).phases[0]) == {"refresh"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
