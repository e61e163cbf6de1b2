"""The garbage collector rests while Dynamo traces for this backend, and only then."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk_fx.runtime.tracing import TracingRest, rest_while_tracing
from tests.runtime.models import SPARSE, TinyDiT, chipmunk, noise


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Dynamo forgets all, and the rest is asked for anew, as when the backend is loaded."""
    torch._dynamo.reset()
    rest_while_tracing()
    gc.enable()
    yield
    gc.enable()
    torch._dynamo.reset()


@pytest.fixture
def seen(enabled: None) -> list[bool]:
    """For every compile, whether the collector was at work when it began."""
    states: list[bool] = []
    torch._dynamo.callback_handler.register_start_callback(lambda *_: states.append(gc.isenabled()))
    return states


def call(compiled: Any) -> Any:
    with torch.no_grad():
        return compiled(noise(), torch.ones(1))


def test_it_rests_while_a_frame_is_traced_and_goes_on_afterwards(seen: list[bool]):
    call(chipmunk(TinyDiT(), options=SPARSE))
    assert seen == [False]
    assert gc.isenabled()


def test_it_rests_in_every_piece_of_a_graph_and_between_them_it_does_not(seen: list[bool]):
    between: list[bool] = []

    class Broken(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
            x = super().forward(latents, timestep, text)
            look()
            return super().forward(x, timestep, text)

    @torch._dynamo.disable
    def look() -> None:
        between.append(gc.isenabled())

    call(chipmunk(Broken(), options=SPARSE))
    assert seen == [False] * len(seen)
    assert len(seen) > 1
    assert between == [True]


def test_other_backends_are_traced_as_ever(seen: list[bool]):
    call(torch.compile(TinyDiT(), backend="eager"))
    call(chipmunk(TinyDiT(), options=SPARSE))
    call(torch.compile(TinyDiT(), backend="eager", dynamic=False))
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert seen == [True, False, True, True]


def test_it_goes_on_after_an_error_in_tracing(seen: list[bool]):
    class Refused(nn.Module):
        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return latents * timestep

    with pytest.raises(torch._dynamo.exc.Unsupported):
        call(chipmunk(Refused(), options=SPARSE, fullgraph=True))
    assert seen == [False]
    assert gc.isenabled()


def test_where_the_user_has_switched_it_off_it_stays_off(seen: list[bool]):
    gc.disable()
    call(chipmunk(TinyDiT(), options=SPARSE))
    assert seen == [False]
    assert not gc.isenabled()


def test_a_dynamo_that_calls_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    rest = TracingRest()
    rest.begin("an argument", "and one more")
    assert gc.isenabled()
    rest.end()
    assert gc.isenabled()
    monkeypatch.delattr(torch._dynamo, "callback_handler")
    rest_while_tracing()


def test_it_is_asked_for_when_the_backend_is_looked_up():
    program = (
        "import gc, torch; compiled = torch.compile(lambda x: x + 1, backend='chipmunk', options={'lowering': 'eager'}); "
        "torch._dynamo.callback_handler.register_start_callback(lambda *_: print(gc.isenabled())); "
        "compiled(torch.ones(2)); print(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "True"], done.stderr[-3000:]
