"""Parts of a last dimension, in every spelling."""

import pytest
import torch

from chipmunk_fx.graph.columns import Columns, columns, parts
from tests.graph.capturing import last, traced

aten = torch.ops.aten

SPELLINGS = {
    "chunk": lambda x: x.chunk(2, -1)[1],
    "chunk by a positive dimension": lambda x: x.chunk(2, 2)[1],
    "split": lambda x: x.split(4, -1)[1],
    "split with sizes": lambda x: x.split([4, 4], -1)[1],
    "tensor_split": lambda x: x.tensor_split(2, -1)[1],
    "slice": lambda x: x[..., 4:],
    "slice from the end": lambda x: x[..., -4:],
    "narrow": lambda x: x.narrow(-1, 4, 4),
    "unflatten and unbind": lambda x: x.unflatten(-1, (2, 4)).unbind(-2)[1],
    "reshape and select": lambda x: x.reshape(2, 3, 2, 4)[:, :, 1],
    "reshape and select from the end": lambda x: x.reshape(2, 3, 2, 4).select(-2, -1),
}
OTHERS = {
    "another dimension": lambda x: x.chunk(3, 1)[1],
    "a slice of rows": lambda x: x[:, 1:],
    "a step": lambda x: x[..., ::2],
    "pairs": lambda x: x.unflatten(-1, (4, 2)).unbind(-1)[1],
    "a fold over rows": lambda x: x.reshape(2, 2, 3, 4).select(-2, 1),
    "a unary op": lambda x: x.sin(),
    "a list along another dimension": lambda x: x.unbind(0)[1],
}


def part(function) -> Columns | None:
    graph = traced(lambda x: function(x.cos()), torch.randn(2, 3, 8)).graph
    return columns(next(n for n in graph.nodes if n.op == "output").args[0])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_second_half_in_all_spellings(spelling: str):
    found = part(SPELLINGS[spelling])
    assert found is not None
    assert (found.start, found.stop, found.width) == (4, 8, 4)
    assert found.source.target is aten.cos.default and found.through[0] is found.node


@pytest.mark.parametrize("spelling", OTHERS)
def test_what_is_no_part_of_the_last_dimension(spelling: str):
    assert part(OTHERS[spelling]) is None


def test_a_part_of_a_part_is_a_part_of_the_whole():
    inner = part(lambda x: x[..., 4:].chunk(2, -1)[1])
    assert inner is not None
    outer = columns(inner.source)
    assert outer is not None
    whole = inner.within(outer)
    assert (whole.start, whole.stop) == (6, 8) and whole.source.target is aten.cos.default


def test_parts_are_listed_where_nothing_else_is_read():
    def divided(x):
        x = x.cos()
        return x.split([2, 6], -1)[1], x[..., :2], x.unflatten(-1, (2, 4)).unbind(-2)[0]

    found = parts(last(traced(divided, torch.randn(2, 3, 8)), aten.cos.default))
    assert found is not None
    assert sorted((p.start, p.stop) for p in found) == [(0, 2), (0, 2), (0, 4), (2, 8), (4, 8)]


def test_parts_of_what_is_also_read_whole_are_not_listed():
    whole = traced(lambda x: (x.cos()[..., :2] + x.cos().sum(), x.cos()), torch.randn(2, 3, 8))
    assert parts(next(n for n in whole.graph.nodes if n.target is aten.cos.default)) is not None
    read = traced(lambda x: [y := x.cos(), y[..., :2]], torch.randn(2, 3, 8))
    assert parts(last(read, aten.cos.default)) is None
