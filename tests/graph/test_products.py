"""Attention without a softmax between its products is named, once a module; written-out softmax attention is not taken for it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.graph.match import find
from chipmunk_fx.patterns import ALL
from tests.graph.capturing import traced

QKV, X = torch.randn(48, 16), torch.randn(2, 24, 16)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def reasons(attend: Attend) -> list[str | None]:
    def model(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, QKV).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v).transpose(1, 2).flatten(2)

    return [candidate.reason for candidate in find(traced(model, X), ALL)]


def weighted_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).relu() / 24, v)


@pytest.mark.parametrize(
    ("attend", "named"),
    [
        (lambda q, k, v: q.relu() @ (k.relu().mT @ v), "stands no softmax: linear attention"),
        (lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), "stands no softmax: linear attention"),
        (lambda q, k, v: torch.sigmoid(q @ k.mT * 0.3) @ v, "stand mul, sigmoid and no softmax"),
        (weighted_einsum, "stand relu, div and no softmax"),
    ],
)
def test_products_without_a_softmax_are_named(attend: Attend, named: str):
    (reason,) = reasons(attend)
    assert reason and named in reason


def test_a_softmax_is_no_such_thing():
    assert reasons(lambda q, k, v: (q @ k.mT).softmax(-1) @ v) == [None]
    assert not any("no softmax" in (reason or "") for reason in reasons(lambda q, k, v: (q @ k.mT).softmax(-2) @ v))


class Recurrent(nn.Module):
    """Keys and values of three frames are summed up one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, 8)).chunk(3, -1)
        state, out = torch.zeros(16, 16), []
        for frame in range(3):
            state = state @ (k[:, frame].mT @ k[:, frame]) + k[:, frame].mT @ v[:, frame]
            out.append(q[:, frame] @ state)
        return torch.cat(out, 1)


def test_a_recurrence_is_named_once():
    torch._dynamo.reset()
    (site,) = chipmunk_fx.explain(Recurrent(), X).sites
    assert (site.kind, site.accepted) == ("attention", False) and "linear attention" in site.reason
