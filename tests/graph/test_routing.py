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
REASON = "chosen or ordered by their content, by the time or at random"
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


class Drawn(Routed):
    """The places are drawn anew at every call."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__(TAKES["gather"], added)
        self.draw = draw

    def places(self, x: Tensor) -> Tensor:
        return self.draw(x).reshape(1, -1)[:, : x.shape[1] // 2]


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


def chosen_row(x: Tensor) -> Tensor:
    return x.mean(-1).argmax(1)


TAKES: dict[str, Take] = {
    "gather": lambda x, places: x.gather(1, wide(places)),
    "take along": lambda x, places: x.take_along_dim(places[..., None], 1),
    "index": lambda x, places: x[torch.arange(len(x))[:, None], places],
    "select": lambda x, places: x.index_select(1, places[0]),
    "look up": lambda x, places: F.embedding(places[0], x[0])[None],
    "one hot": lambda x, places: F.one_hot(places, x.shape[1]).to(x.dtype) @ x,
    "one hot, einsum": lambda x, places: torch.einsum("bks,bsc->bkc", F.one_hot(places, x.shape[1]).float(), x),
    "sort": lambda x, _: x.sort(1).values[:, : x.shape[1] // 2],
    "channels first": lambda x, places: x.mT.gather(-1, wide(places).mT).mT,
    "channels first, index": lambda x, places: x.mT[..., places[0]].transpose(1, 2),
    "equal": lambda x, places: (places[..., None] == torch.arange(x.shape[1])).to(x.dtype) @ x,
    "identity": lambda x, places: torch.eye(x.shape[1])[places] @ x,
    "ones sent": lambda x, places: torch.zeros(1, 36, 72).scatter(2, places[..., None], 1.0) @ x,
    "ones sent, turned": lambda x, places: torch.zeros(1, 72, 36).scatter(1, places[:, None], 1.0).mT @ x,
    "ones put": lambda x, places: torch.zeros(36, 72).index_put((torch.arange(36), places[0]), torch.tensor(1.0)) @ x,
    "weighted": lambda x, places: (F.one_hot(places, x.shape[1]) * x.mean(-1, keepdim=True)[:, :36]) @ x,
    "repeated": lambda x, places: x[:, :36].repeat_interleave(places[0], 1, output_size=72),
    "repeated numbers": lambda x, places: x[:, torch.repeat_interleave(places[0], output_size=72)],
    "folded": lambda x, places: x.flatten(0, 1)[places.flatten()].unflatten(0, (1, -1)),
    "then joined": lambda x, places: torch.cat([x.gather(1, wide(places)), x], 1)[:, : places.shape[1]],
}
WHOLE: dict[str, Take] = {
    "a row joined": lambda x, _: torch.cat([x[torch.arange(len(x)), chosen_row(x)][:, None], x], 1),
    "written to memory": filled,
    "sent": sent,
    "sent by ranks": lambda x, _: torch.zeros_like(x).scatter(1, wide((x[..., :1] > x[:, None, :, 0]).sum(1)), x),
    "sent by a product": lambda x, places: F.one_hot(places, x.shape[1]).to(x.dtype).mT @ x[:, : places.shape[1]],
}


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


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": lambda order: (order[..., None] == torch.arange(72)).float(),
    "identity": lambda order: torch.eye(72)[order],
    "one hot": lambda order: F.one_hot(order, 72).float(),
    "ones sent": lambda order: torch.zeros(1, 72, 72).scatter_(2, order[..., None], 1.0),
}


@pytest.mark.parametrize("matrix", list(MATRICES))
@pytest.mark.parametrize("undone", [True, False])
def test_the_transpose_of_a_permutation_matrix_puts_tokens_back(matrix: str, undone: bool):
    def put(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        again = MATRICES[matrix](order)
        return x + (again.mT if undone else again) @ rows

    block = Sorted(lambda x, order: MATRICES[matrix](order) @ x, put)
    assert verdicts(block) == [("blocks.0", "mlp", False), *((name, kind, undone) for name, kind, _ in LATER)]


@pytest.mark.parametrize("first", [True, False])
def test_an_order_or_its_inverse_taken_twice_puts_nothing_back(first: bool):
    def put(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        inverse = wide(order.argsort(1))
        return x + (rows.gather(1, wide(order)) if first else rows.gather(1, inverse).gather(1, inverse))

    assert {accepted for _, _, accepted in verdicts(Sorted(TAKES["gather"], put))} == {False}


def test_ranks_that_sent_tokens_fetch_them_back():
    class Ranked(Routed):
        def places(self, x: Tensor) -> Tensor:
            scores = self.router(x).squeeze(-1)
            return (scores[:, :, None] > scores[:, None]).sum(-1)

    def take(x: Tensor, ranks: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(1, wide(ranks), x)

    block = Ranked(take, lambda x, ranks, rows: x + rows.gather(1, wide(ranks)))
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


class Experts(Routed):
    """Each token goes to a slot of one expert: GShard's dispatch and combine, the former weighted or not."""

    def __init__(self, dispatch: Callable[[Tensor], Tensor]) -> None:
        super().__init__(TAKES["gather"], added)
        self.router, self.dispatch = nn.Linear(WIDTH, 4), dispatch

    def combine(self, x: Tensor) -> Tensor:
        gate, expert = self.router(x).softmax(-1).max(-1)
        mask = F.one_hot(expert, 4)
        slot = F.one_hot(((mask.cumsum(0) - 1) * mask).sum(-1), 72)
        return gate[:, None, None] * mask[:, :, None] * slot[:, None]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x[0])
        combine = self.combine(tokens)
        rows = torch.einsum("nec,nd->ecd", self.dispatch(combine), tokens)
        return x + torch.einsum("nec,ecd->nd", combine, self.fc2(F.gelu(self.fc1(rows))))


class Best(Experts):
    """Each token goes to its two best experts, whose slots are counted together."""

    def combine(self, x: Tensor) -> Tensor:
        gates, experts = self.router(x).softmax(-1).topk(2, -1)
        mask = F.one_hot(experts, 4).mT.sum(-1)
        slot = F.one_hot((mask.cumsum(0) * mask - 1).clamp(0), 72)
        return slot * (mask * torch.zeros_like(mask).float().scatter(1, experts, gates))[..., None]


@pytest.mark.parametrize("experts", [Experts, Best])
@pytest.mark.parametrize(
    "dispatch", [lambda combine: combine, lambda combine: combine.bool().float(), lambda combine: (combine > 0).float()]
)
def test_experts_get_chosen_tokens_by_a_weighted_product(experts: type[Experts], dispatch: Callable[[Tensor], Tensor]):
    assert verdicts(experts(dispatch)) == [("blocks.0", "mlp", False), *LATER]


class Slots(Experts):
    """The same by an index: a slot for each token."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x[0])
        expert = self.router(tokens).argmax(-1)
        slot = expert * 72 + (F.one_hot(expert, 4).cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
        rows = torch.zeros(4 * 72, WIDTH)
        rows[slot] = tokens
        return x + self.fc2(F.gelu(self.fc1(rows.unflatten(0, (4, 72))))).flatten(0, 1)[slot]


def test_tokens_fetched_from_their_slots_are_in_their_places():
    assert verdicts(Slots(lambda combine: combine)) == [("blocks.0", "mlp", False), *LATER]


def test_rows_of_all_samples_in_one_are_those_of_each_again():
    def take(x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, wide(places)).flatten(0, 1)[None]

    block = Routed(take, lambda x, places, rows: added(x, places, rows[0].unflatten(0, (len(x), -1))))
    assert verdicts(block) == [("blocks.0", "mlp", False), *LATER]


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


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randperm(x.shape[1]),
        lambda x: torch.rand(x.shape[1]).argsort(),
        lambda x: torch.randn_like(x[..., 0]).argsort(1),
        lambda x: torch.rand(1, x.shape[1]).topk(40).indices,
        lambda x: torch.ones(x.shape[1]).multinomial(40),
        lambda x: (torch.arange(x.shape[1]) + torch.randint(72, ())) % x.shape[1],
        lambda x: torch.empty(x.shape[1]).uniform_().argsort(),
    ],
    ids=["permutation", "ranks", "ranks alike", "best", "multinomial", "shift", "in place"],
)
def test_tokens_drawn_at_random_are_refused(draw: Callable[[Tensor], Tensor]):
    assert verdicts(Drawn(draw)) == [("blocks.0", "mlp", False), *LATER]


def kinds(x: Tensor) -> Tensor:
    return x[..., :2].argmax(-1)


BESIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row": lambda x, _: x + x[torch.arange(len(x)), chosen_row(x)][:, None],
    "row gathered": lambda x, _: x + x.gather(1, wide(x.mean(-1).topk(1, 1).indices)),
    "row squeezed": lambda x, _: x * x.gather(1, wide(chosen_row(x)[:, None])).squeeze(1)[:, None],
    "row expanded": lambda x, _: x + x.index_select(1, chosen_row(x)).expand_as(x),
    "row of a product": lambda x, _: x + F.one_hot(chosen_row(x), x.shape[1]).float()[:, None] @ x,
    "row of another kind": lambda x, _: (
        x + torch.stack([x, -x], 2).gather(2, kinds(x)[..., None, None].expand(-1, -1, 1, WIDTH)).squeeze(2)
    ),
    "row of another kind, index": lambda x, _: (
        x + torch.stack([x, -x], 2)[torch.arange(1)[:, None], torch.arange(72), kinds(x)]
    ),
    "label": lambda x, table: x + F.embedding(x.mean(1).argmax(-1), table)[:, None],
    "code of each token": lambda x, table: x + F.embedding(x.argmax(-1), table),
    "sorted weights": lambda x, _: x * x[..., :1].sort(1).values,
    "threshold of a sort": lambda x, _: x * (x[..., :1] > x[..., :1].sort(1).values[:, 20:21]),
    "threshold of the best": lambda x, _: x.masked_fill(x[..., :1] < x[..., 0].topk(9, 1).values[:, -1, None, None], 0),
    "mask of the best": lambda x, _: (
        x * torch.zeros_like(x[..., 0]).scatter(1, x[..., 0].topk(9, 1).indices, 1)[..., None]
    ),
    "noise": lambda x, _: x + torch.randn_like(x),
    "tokens dropped at random": lambda x, _: x * (torch.rand_like(x[..., :1]) > 0.1),
    "dropout": lambda x, _: F.dropout(x, 0.1, training=True),
    "mean of the nearest": lambda x, _: x + x[0][(x @ x.mT).topk(4).indices].mean(2),
}


@pytest.mark.parametrize("beside", list(BESIDE))
def test_tokens_that_stay_are_not_chosen_whatever_is_added_to_them(beside: str):
    block = Turned(lambda x, _: x, lambda x, _, rows: x + rows)
    block.take = lambda x, _: block.norm(BESIDE[beside](x, block.fc1.weight))
    assert verdicts(block) == [("blocks.0", "mlp", True), *LATER]


def test_weights_of_a_router_choose_no_tokens():
    found = verdicts(Gated(lambda x, _: x, lambda x, weights, rows: x + rows * weights[..., None]))
    assert found == [("blocks.0", "mlp", True), *LATER]


class Masked(TinyDiT):
    """Takes the words that a mask, which is an input, puts first, and one embedding for all tokens of one time."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        words = text[torch.arange(len(text))[:, None], mask.argsort(dim=1, descending=True, stable=True)]
        times, which = timestep.unique(return_inverse=True)
        return super().forward(latents * times[which][:, None, None, None], timestep, words)


def test_masks_are_no_content_and_times_order_no_embeddings():
    latents, timestep, _ = CALL
    plan = captured(Masked(), latents, timestep, torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool)).plan()
    assert len(plan.sites) == 2 and not plan.refused


LINES = torch.arange(16)
BY_TIME: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "shifted": lambda x, t, _: x[:, :, (LINES + t.long()) % 16],
    "sorted": lambda x, t, _: x[:, :, (LINES * t).sin().argsort()],
    "one of two": lambda x, t, _: x.index_select(2, torch.where(t > 500, LINES, LINES.flip(0))),
    "of a table": lambda x, t, _: x[:, :, torch.stack([LINES, LINES.flip(0)])[t.long() % 2][0]],
    "gathered": lambda x, t, _: x.gather(2, ((LINES + t.long()) % 16)[:, None].expand_as(x)),
    "sent": lambda x, t, _: torch.zeros_like(x).index_copy(2, (LINES + t.long()) % 16, x),
    "by scores that are an input": lambda x, _, scores: x[:, :, scores[0].argsort()],
}


@pytest.mark.parametrize("order", BY_TIME)
def test_tokens_that_the_time_orders(order: str):
    class Timed(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
            return super().forward(BY_TIME[order](latents, timestep, scores), timestep, text)

    plan = captured(Timed(), *CALL, torch.rand(1, 16)).plan()
    assert not plan.sites and all(REASON in (c.reason or "") for c in plan.refused)


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
