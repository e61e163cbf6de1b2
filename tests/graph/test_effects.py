"""Which graphs may be called over: what is written and drawn, however it is spelled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chipmunk_fx.graph.effects import repeatable, writes_inputs
from tests.graph.capturing import captured


@torch.library.custom_op("effects::count", mutates_args={"kept"})
def count(x: Tensor, kept: Tensor) -> Tensor:
    kept.add_(1)
    return x.clone()


@torch.library.custom_op("effects::draw", mutates_args=())
def draw(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


for op in (count, draw):
    op.register_fake(lambda x, *_: torch.empty_like(x))


def chunked(x: Tensor, kept: Tensor) -> Tensor:
    first, _ = torch.chunk(kept, 2)
    return x + first.add_(1).sum()


def in_a_list(x: Tensor, kept: Tensor) -> Tensor:
    torch._foreach_add_([kept], 1.0)
    return x + kept.sum()


CONSTANT = torch.zeros(4)
WRITING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in place": lambda x, kept: x + kept.add_(1).sum(),
    "a view of a view": lambda x, kept: x + kept.view(2, 2)[0].t().mul_(2).sum(),
    "an element": lambda x, kept: x + kept.unbind(0)[1].add_(1),
    "a chunk": chunked,
    "in a list": in_a_list,
    "as out": lambda x, kept: x + torch.add(x[0], 1.0, out=kept).sum(),
    "a constant": lambda x, kept: x + CONSTANT.view(2, 2)[1].add_(1).sum(),
    "second argument": lambda x, kept: count(x * 1.0, kept),
    "running means": lambda x, kept: F.batch_norm(x, kept, kept.clone(), training=True),
}
DRAWING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "noise": lambda x, kept: x + torch.randn_like(x),
    "dropout": lambda x, kept: F.dropout(x, 0.5, training=True),
    "dropout of attention": lambda x, kept: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "others' operator": lambda x, kept: draw(x),
}
HARMLESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "its own tensor in place": lambda x, kept: (x * 2).add_(kept.sum()),
    "a copy of a chunk": lambda x, kept: x + torch.chunk(kept, 2)[0].clone().add_(1).sum(),
    "idle dropout": lambda x, kept: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0, training=True),
    "attention": lambda x, kept: F.scaled_dot_product_attention(x, x, x),
    "norm of known means": lambda x, kept: F.batch_norm(x, kept, kept.abs(), training=False),
    "numbers": lambda x, kept: x[: x.shape[0] // 2 + max(x.shape[1], 2)] * 2.0,
}


class Calling(nn.Module):
    """A function of a picture and of something the model keeps."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("kept", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kept)


def graph_of(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return captured(Calling(function), torch.randn(4, 4)).capture.module.graph


@pytest.mark.parametrize("name", WRITING)
def test_what_writes_its_inputs(name: str):
    graph = graph_of(WRITING[name])
    assert writes_inputs(graph) and not repeatable(graph)


@pytest.mark.parametrize("name", DRAWING)
def test_what_draws_random_numbers(name: str):
    graph = graph_of(DRAWING[name])
    assert not writes_inputs(graph) and not repeatable(graph)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_nothing_behind(name: str):
    graph = graph_of(HARMLESS[name])
    assert repeatable(graph) and not writes_inputs(graph)


def test_branches_that_the_data_chooses_are_not_looked_into():
    def choosing(x: Tensor, kept: Tensor) -> Tensor:
        return torch.cond(kept.sum() > 0, lambda x: x + torch.randn_like(x), lambda x: x * 2, (x,))

    assert not repeatable(graph_of(choosing))
