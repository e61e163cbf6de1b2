"""Which dimensions of a result are in an order that content chose, whatever ops came between."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.graph.axes import order
from chipmunk_fx.graph.moves import follow
from chipmunk_fx.graph.orders import Orders
from tests.graph.capturing import traced

TOKENS, SCORES = torch.randn(2, 12, 4), torch.randn(2, 12)


def ordered(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[int]:
    """Dimensions of what `function` makes of tokens in an order, of that order and of the tokens as they were."""

    def run(x: Tensor, scores: Tensor) -> Tensor:
        places = scores.argsort(1)
        return function(x.gather(1, places[..., None].expand(-1, -1, 4)), places, x)

    nodes = traced(run, TOKENS, SCORES).graph.nodes
    orders = Orders(node for node in nodes if node.op == "placeholder")
    for node in nodes:
        follow(node, orders)
    result = next(node for node in nodes if node.op == "output").args[0]
    return [at for at, dim in enumerate(orders.dims(result)) if order(dim)]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "turned": (lambda y: y.mT, [2]),
    "permuted": (lambda y: y.permute(1, 2, 0), [0]),
    "moved": (lambda y: y.movedim(1, 0), [0]),
    "folded": (lambda y: y.flatten(0, 1), [0]),
    "folded and back": (lambda y: y.reshape(24, 4)[None].view(2, 12, 4), [1]),
    "all in one": (lambda y: y.flatten().view(2, 12, 2, 2), [1]),
    "heads": (lambda y: y.unflatten(-1, (2, 2)).transpose(1, 2), [2]),
    "grid": (lambda y: y.unflatten(1, (3, 4)), [1, 2]),
    "squeezed": (lambda y: y[:, None].squeeze(1), [1]),
    "copied": (lambda y: y.expand(3, -1, -1, -1), [2]),
    "cut": (lambda y: y[:, 2:7], [1]),
    "split": (lambda y: y.chunk(3, 1)[1], [1]),
    "split channels": (lambda y: y.unbind(-1)[0], [1]),
    "stacked": (lambda y: torch.stack([y, y], 1), [2]),
    "joined": (lambda y: torch.cat([y, y.new_zeros(2, 3, 4)], 1), [1]),
    "padded": (lambda y: F.pad(y, (0, 0, 1, 1)), [1]),
    "rolled": (lambda y: y.roll(1, 1), [1]),
    "repeated": (lambda y: y.repeat_interleave(2, 1), [1]),
    "windows": (lambda y: y.unfold(2, 2, 2), [1]),
    "complex": (lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (2, 2)))), [1]),
    "normed": (lambda y: F.layer_norm(y, (4,)), [1]),
    "projected": (lambda y: F.linear(y, torch.ones(5, 4)), [1]),
    "convolved": (lambda y: F.conv1d(y.mT, torch.ones(4, 4, 3), padding=1), [2]),
    "queries": (lambda y: F.scaled_dot_product_attention(y, torch.ones(2, 9, 4), torch.ones(2, 9, 5)), [1]),
    "keys": (lambda y: F.scaled_dot_product_attention(torch.ones(2, 9, 4), y, y), []),
    "scores": (lambda y: (y @ y.mT).softmax(-1), [1, 2]),
    "attention": (lambda y: (torch.ones(2, 9, 4) @ y.mT).softmax(-1) @ y, []),
    "mixed": (lambda y: F.linear(y.mT, torch.ones(5, 12)).mT, [1]),
    "averaged": (lambda y: y.mean(1), []),
    "best": (lambda y: y.amax((0, 1), keepdim=True), []),
    "all summed": (lambda y: y.sum()[None], []),
    "running": (lambda y: y.cumsum(1), [1]),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_order_is_followed_dimension_by_dimension(layout: str):
    function, dims = LAYOUTS[layout]
    assert ordered(lambda y, *_: function(y)) == dims


EINSUMS = ["bkn,bnc->bkc", "bkn,bnc", "...kn,...nc->...kc", "bkn,bnc->ckb"]


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_moves_rows_of_any_layout(equation: str):
    found = ordered(lambda y, places, x: torch.einsum(equation, F.one_hot(places, 12).float(), x))
    assert found == [1]


def test_a_part_of_an_inverse_is_none():
    def part(y: Tensor, places: Tensor, x: Tensor) -> Tensor:
        return y.gather(1, places[:, :6].argsort(1)[..., None].expand(-1, -1, 4))

    assert ordered(part) == [1]


def test_what_a_mask_picks_it_puts_back():
    def put(y: Tensor, places: Tensor, x: Tensor) -> Tensor:
        mask = places > 5
        rows = torch.zeros_like(x)
        return rows.masked_scatter(mask[..., None].expand_as(x), x.masked_select(mask[..., None].expand_as(x)))

    assert ordered(put) == []


def test_a_window_that_content_begins_is_chosen():
    def window(y: Tensor, places: Tensor, x: Tensor) -> Tensor:
        return x[:, x.mean((0, 2)).argmax() + torch.arange(3) - 2]

    assert ordered(window) == [1]
