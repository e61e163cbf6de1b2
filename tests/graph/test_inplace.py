"""Arithmetic in place is written out of place where nothing can tell, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk_fx.graph.walk import written
from tests.graph.capturing import captured


def stream(x: Tensor, y: Tensor) -> Tensor:
    x = x + 1
    x += y
    x *= 2
    return x.transpose(0, 1) - y.sum()


def on_an_input(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x.sin()


def read_afterwards(x: Tensor, y: Tensor) -> Tensor:
    x = x + 1
    first = x[0]
    x += y
    return x.sin() + first


def through_a_view(x: Tensor, y: Tensor) -> Tensor:
    x = x + 1
    x[0] += y[0]
    return x.sin()


def of_another_type(x: Tensor, y: Tensor) -> Tensor:
    x = x.to(torch.float16)
    x += y
    return x.sin()


def writes(function: Callable[..., Any]) -> int:
    """How many writes in place are left in the captured graph, whose values are the function's."""

    class Whole(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    x, y = torch.randn(3, 3), torch.randn(3, 3)
    module = captured(Whole(), x, y).capture.module
    given = x.clone(), x.clone()
    torch.testing.assert_close(module(given[0], y)[0], function(given[1], y))
    assert torch.equal(*given)
    return sum(bool(written(node)) for node in module.graph.nodes)


def test_a_stream_is_added_to_out_of_place():
    assert writes(stream) == 0


@pytest.mark.parametrize("function", [on_an_input, read_afterwards, through_a_view, of_another_type])
def test_what_can_be_told_apart_stays(function):
    assert writes(function) >= 1
