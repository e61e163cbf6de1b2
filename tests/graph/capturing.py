"""Graphs to look at: a function traced to ATen, or a model captured as the backend captures it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from chipmunk_fx.config import Config
from chipmunk_fx.graph.capture import Capture, capture
from chipmunk_fx.graph.geometry import Geometry, find_geometry, sequence_lengths
from chipmunk_fx.graph.inputs import Roles, classify
from chipmunk_fx.graph.match import Candidate, find
from chipmunk_fx.graph.plan import Plan, make_plan
from chipmunk_fx.patterns import ALL
from tests.harness.zoo import build
from tests.runtime.models import TinyDiT, calls

aten = torch.ops.aten


@torch.no_grad()
def traced(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """`function` as a pre-dispatch ATen graph."""
    return make_fx(function, pre_dispatch=True)(*args)


def last(module: fx.GraphModule, op: Any) -> fx.Node:
    """The last call of `op`."""
    return next(n for n in reversed(module.graph.nodes) if n.target is op)


@dataclass(frozen=True)
class Seen:
    """What the backend was given for one graph, and what it made of it."""

    given: fx.GraphModule
    inputs: tuple[Any, ...]
    capture: Capture

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.capture.inputs]

    @property
    def roles(self) -> Roles:
        return classify(self.capture)

    @property
    def candidates(self) -> list[Candidate]:
        return find(self.capture.module, ALL)

    def role(self, name: str) -> Any:
        """The name of the input (or the names of the inputs) in a role."""
        found = getattr(self.roles, name)
        if isinstance(found, tuple):
            return tuple(self.names[index] for index in found)
        return None if found is None else self.names[found]

    def geometry(self, **options: Any) -> Geometry:
        return self._geometry(self.candidates, config_of(options))

    def _geometry(self, candidates: list[Candidate], config: Config) -> Geometry:
        return find_geometry(self.capture, self.roles, config.tokens, sequence_lengths(candidates), self.inputs)

    def plan(self, judge: Callable[[Any], str | None] = lambda site: None, /, **options: Any) -> Plan:
        """Options with dots are written with two underscores; `judge` is the cost gate."""
        candidates, config = self.candidates, config_of(options)
        geometry = self._geometry(candidates, config)
        return make_plan(self.capture, candidates, self.roles, geometry, config, judge, self.inputs)


@cache
def captured_tiny(depth: int = 1, side: int = 16) -> Seen:
    """The capture of `TinyDiT`, with 8 text tokens."""
    return captured(TinyDiT(depth), *calls([900], side=side)[0])


@cache
def captured_from_zoo(name: str) -> Seen:
    """The capture of one of the zoo's models."""
    model, inputs = build(name)
    return captured(model, **inputs)


def config_of(options: dict[str, Any]) -> Config:
    return Config.from_options({key.replace("__", "."): value for key, value in options.items()})


class _Done(BaseException):
    pass


def captured(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Seen:
    """The capture of a model that is one graph. Raises what `capture` raises."""
    seen: list[Seen] = []
    failed: list[Exception] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        try:
            seen.append(Seen(module, tuple(inputs), capture(module, inputs)))
        except Exception as error:
            failed.append(error)
        raise _Done

    torch._dynamo.reset()
    with torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
        except _Done:
            if failed:
                raise failed[0] from None
    return seen[0]
