"""Sites on tokens that their content chooses or orders are refused, those behind are not once all are in their places."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chipmunk_fx.graph.routing import orders_of
from tests.graph.capturing import Seen, captured
from tests.runtime.models import HEADS, WIDTH, TinyDiT, calls

CALL = calls([900])[0]
REASON = "chosen or ordered by their content"
Take = Callable[[Tensor, Tensor], Tensor]


def wide(places: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, WIDTH)


class Routed(nn.Module):
    """`take` picks tokens for an MLP, of which `put` makes the block's result."""

    def __init__(self, take: Take, put: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.take, self.put = take, put
        self.register_buffer("turned", torch.arange(72).flip(0))

    def places(self, x: Tensor) -> Tensor:
        return self.router(x).squeeze(-1).topk(x.shape[1] // 2, dim=1).indices

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(self.norm(x))
        return self.put(x, places, self.fc2(F.gelu(self.fc1(self.take(self.norm(x), places)))))


class Turned(Routed):
    """The places are those of a buffer, whatever the tokens hold."""

    turned: Tensor

    def places(self, x: Tensor) -> Tensor:
        return self.turned[None, : x.shape[1]]


class Gated(Routed):
    """Every token stays where it is and is weighted by the largest of its scores."""

    def places(self, x: Tensor) -> Tensor:
        scores = self.fc1(x).softmax(-1)
        best, where = scores.topk(2, dim=-1)
        return torch.zeros_like(scores).scatter(-1, where, best).sum(-1)


class Attending(nn.Module):
    """Attention of half of the tokens, or of all with half of the queries, or of the keys and values."""

    def __init__(self, some: str) -> None:
        super().__init__()
        self.qkv, self.router, self.some = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1), some

    def forward(self, x: Tensor) -> Tensor:
        places = wide(self.router(x).squeeze(-1).argsort(1)[:, : x.shape[1] // 2])
        tokens = x.gather(1, places) if self.some == "tokens" else x
        q, k, v = self.qkv(tokens).chunk(3, -1)
        if self.some == "queries":
            q = q.gather(1, places)
        if self.some == "keys":
            k, v = k.gather(1, places), v.gather(1, places)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        result = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + result if self.some == "keys" else x.scatter_add(1, places, result)


def added(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    return x.scatter_add(1, wide(places), rows)


def in_place(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[0, places[0]] = rows[0]
    return x


def filled(x: Tensor, places: Tensor) -> Tensor:
    """The tokens picked, in the first rows of memory for all."""
    rows = torch.zeros_like(x)
    rows[:, : places.shape[1]] = x.gather(1, wide(places))
    return rows


def sent(x: Tensor, places: Tensor) -> Tensor:
    """Half of the tokens, in places of their content's choice."""
    return torch.zeros_like(x).scatter(1, wide(places), x[:, : places.shape[1]])


TAKES: dict[str, Take] = {
    "gather": lambda x, places: x.gather(1, wide(places)),
    "take along": lambda x, places: x.take_along_dim(places[..., None], 1),
    "index": lambda x, places: x[torch.arange(len(x))[:, None], places],
    "select": lambda x, places: x.index_select(1, places[0]),
    "look up": lambda x, places: F.embedding(places[0], x[0])[None],
    "one hot": lambda x, places: F.one_hot(places, x.shape[1]).to(x.dtype) @ x,
    "one hot, einsum": lambda x, places: torch.einsum("bks,bsc->bkc", F.one_hot(places, x.shape[1]).float(), x),
    "sort": lambda x, _: x.sort(1).values[:, : x.shape[1] // 2],
    "then joined": lambda x, places: torch.cat([x.gather(1, wide(places)), x], 1)[:, : places.shape[1]],
}
WHOLE: dict[str, Take] = {"written to memory": filled, "sent": sent}


def seen(block: nn.Module) -> Seen:
    model = TinyDiT(depth=2)
    model.blocks[0] = block
    return captured(model.eval(), *CALL)


def verdicts(block: nn.Module) -> list[tuple[str, str, bool]]:
    """Block, kind and whether it is accepted, of sites that are refused for what is looked at here or accepted."""
    plan = seen(block).plan()
    assert all(REASON in (c.reason or "") for c in plan.refused), [c.reason for c in plan.refused]
    found = [(c.name, c.kind, False) for c in plan.refused] + [(s.name, s.kind, True) for s in plan.sites]
    return sorted(found)


LATER = [("blocks.1", "attention", True), ("blocks.1", "mlp", True)]


@pytest.mark.parametrize("take", list(TAKES))
@pytest.mark.parametrize("put", [added, in_place])
def test_an_mlp_of_chosen_tokens_is_refused_and_what_comes_behind_is_not(take: str, put: Callable[..., Tensor]):
    assert verdicts(Routed(TAKES[take], put)) == [("blocks.0", "mlp", False), *LATER]


@pytest.mark.parametrize("take", list(WHOLE))
def test_tokens_moved_by_writing_them_are_chosen_too(take: str):
    found = verdicts(Routed(WHOLE[take], lambda x, places, rows: x + rows.mean(1, keepdim=True)))
    assert found == [("blocks.0", "mlp", False), *LATER]


def test_tokens_that_stay_chosen_are_refused_ever_after():
    found = verdicts(Routed(TAKES["gather"], lambda x, places, rows: torch.cat([rows, rows], 1)))
    assert found == [(name, kind, False) for name, kind, _ in [("blocks.0", "mlp", False), *LATER]]


def numbered(order: Tensor) -> Tensor:
    """The inverse of one permutation, written in place."""
    inverse = torch.empty_like(order.flatten())
    inverse[order.flatten()] = torch.arange(order.shape[1])
    return inverse[None]


class Sorted(Routed):
    """All tokens in the order of their scores."""

    def places(self, x: Tensor) -> Tensor:
        return self.router(x).squeeze(-1).sort(dim=1).indices


INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda order: order.argsort(1),
    "sort": lambda order: order.sort(1).indices,
    "numbers": lambda order: torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1])[None]),
    "numbers in place": numbered,
}


@pytest.mark.parametrize("inverse", list(INVERSES))
def test_tokens_are_back_in_their_places_after_the_inverse_order(inverse: str):
    block = Sorted(TAKES["gather"], lambda x, order, rows: x + rows.gather(1, wide(INVERSES[inverse](order))))
    assert verdicts(block) == [("blocks.0", "mlp", False), *LATER]


def test_the_inverse_of_another_order_puts_nothing_back():
    def put(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        return rows.gather(1, wide(order.argsort(1, descending=True)))

    assert {accepted for _, _, accepted in verdicts(Sorted(TAKES["gather"], put))} == {False}


def test_what_was_chosen_before_it_was_sorted_still_is_when_that_is_undone():
    class Twice(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            half = x.gather(1, wide(Routed.places(self, x)))
            done = super().forward(half)
            return torch.cat([done, done], 1)

    block = Twice(TAKES["gather"], lambda x, order, rows: x + rows.gather(1, wide(order.argsort(1))))
    assert {accepted for _, _, accepted in verdicts(block)} == {False}


@pytest.mark.parametrize("undone", [True, False])
def test_blocks_are_skipped_where_tokens_are_in_their_places(undone: bool):
    def put(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        return x + (rows.gather(1, wide(order.argsort(1))) if undone else rows)

    region = seen(Sorted(TAKES["gather"], put)).plan().region
    assert isinstance(region, str) is not undone and (undone or REASON in str(region))


@pytest.mark.parametrize("some", ["tokens", "queries", "keys"])
def test_attention_of_chosen_tokens_is_refused(some: str):
    assert verdicts(Attending(some)) == [("blocks.0", "attention", False), *LATER]


@pytest.mark.parametrize("take", ["gather", "take along", "index", "select", "look up"])
def test_an_order_that_never_changes_is_none_of_the_content(take: str):
    assert verdicts(Turned(TAKES[take], added)) == [("blocks.0", "mlp", True), *LATER]


def test_weights_of_a_router_choose_no_tokens():
    found = verdicts(Gated(lambda x, _: x, lambda x, weights, rows: x + rows * weights[..., None]))
    assert found == [("blocks.0", "mlp", True), *LATER]


class Masked(TinyDiT):
    """Takes the words that a mask, which is an input, puts first, and tokens in the order of the timestep's choice."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        words = text[torch.arange(len(text))[:, None], mask.argsort(dim=1, descending=True, stable=True)]
        order = (torch.arange(latents.shape[2]) * timestep[0]).argsort()
        return super().forward(latents[:, :, order], timestep, words)


def test_masks_and_times_are_no_content():
    latents, timestep, _ = CALL
    plan = captured(Masked(), latents, timestep, torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool)).plan()
    assert len(plan.sites) == 2 and not plan.refused


def test_sizes_of_activations_are_no_content():
    class Sized(Routed):
        def places(self, x: Tensor) -> Tensor:
            return (torch.ones_like(x[..., 0]).cumsum(1) - 1).long().flip(1)

    assert verdicts(Sized(TAKES["gather"], added)) == [("blocks.0", "mlp", True), *LATER]


def test_a_piece_of_a_model_has_streams_for_latents():
    block = captured(Routed(TAKES["gather"], added), torch.randn(1, 64, WIDTH))
    assert [c.reason for c in block.plan().refused] and not block.plan().sites


def test_nothing_is_chosen_where_nothing_picks():
    given = captured(TinyDiT(depth=2), *CALL)
    orders = orders_of(given.capture, given.roles)
    assert not any(map(orders.is_moved, given.capture.module.graph.nodes))
