"""Modules as source text, so that one that fails can be read, and run, as it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

# Values are unchanged by these; a compiler has to look through them.
IDENTITIES = (
    "{}.contiguous()",
    "{}.clone()",
    "{0}.to({0}.dtype)",
    "F.dropout({}, 0.1, training=False)",
    "F.dropout({}, 0.0)",
    "{}.to(torch.float32)",
    "{}.detach()",
)


@dataclass
class Spelling:
    """`layers`: what __init__ sets, in order; `lines` of forward, which takes `inputs` (all [B, ...] float or bool)."""

    layers: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)  # functions that the text names

    def __repr__(self) -> str:
        made = [f"self.{name} = {maker}" for name, maker in self.layers.items()]
        return "\n".join(
            [
                "class Spelled(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in made),
                f"    def forward(self, {', '.join(self.inputs)}):",
                *(f"        {line}" for line in self.lines),
                *(f"# {name} = {maker}" for name, maker in self.inputs.items()),
            ]
        )

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module, its weights three times as large as usual so that scores and activations differ, and its inputs."""
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F} | self.space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(repr(self), space)
            module = space["Spelled"]().eval()
            with torch.no_grad():
                [p.mul_(3) for p in module.parameters() if p.dim() > 1]
            return module, tuple(eval(maker, space) for maker in self.inputs.values())


class Pen:
    """Writes a spelling, asking hypothesis at every choice."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw, self.spelling = draw, Spelling()

    def pick(self, *options: Any) -> Any:
        """One of `options`; failing spellings are simplified towards the first."""
        return self.draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def input(self, name: str, maker: str) -> str:
        self.spelling.inputs[name] = maker
        return name

    def layer(self, name: str, maker: str) -> str:
        """Set self.<name>, under another name where that one is taken."""
        while name in self.spelling.layers:
            name += "_"
        self.spelling.layers[name] = maker
        return f"self.{name}"

    def linear(self, name: str, width: int, out: int, bias: bool | None = None) -> str:
        bias = self.chance(70) if bias is None else bias
        return self.layer(name, f"nn.Linear({width}, {out}{'' if bias else ', bias=False'})")

    def line(self, text: str) -> None:
        self.spelling.lines.append(text)

    def let(self, name: str, value: str) -> str:
        """`name = value`, now and then through ops that change nothing."""
        self.line(f"{name} = {value}")
        if self.chance(12):
            self.line(f"{name} = {self.pick(*IDENTITIES).format(name)}")
        return name
