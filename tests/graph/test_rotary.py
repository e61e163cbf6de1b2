"""Norm and rotation of queries and keys: which spellings become one operator, that nothing else does, and the same values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from chipmunk_fx.graph.rotary import fuse_rotary
from tests.graph.capturing import traced

TOKENS, HEADS, WIDTH = 12, 3, 16


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-b, a], dim=-1).flatten(3).float() * sin).to(x.dtype)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)


def folded_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return (sin * torch.cat([-b, a], dim=-1).float() + x.float() * cos).to(x.dtype)


def sliced_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight, 1e-6)


def inputs(first: bool = False) -> list[Tensor]:
    """q of an image and of a text, a weight for each, cos and sin of both; first: heads before tokens."""
    torch.manual_seed(0)
    q = [torch.randn(2, n, HEADS, WIDTH, dtype=torch.bfloat16) for n in (TOKENS - 4, 4)]
    angles = [torch.randn(1, TOKENS, 1, WIDTH) for _ in range(2)]
    weights = [torch.randn(WIDTH, dtype=torch.bfloat16) for _ in range(2)]
    q, angles = ([t.transpose(1, 2) if first else t for t in some] for some in (q, angles))
    return [*q, *weights, *angles]


def fused(function: Callable[..., Tensor], args: list[Tensor]) -> tuple[int, fx.GraphModule]:
    module = traced(function, *args)
    count = fuse_rotary(module.graph, lambda x: x.shape[-1] == WIDTH)
    module.graph.lint()
    module.recompile()
    return count, module


def same(module: fx.GraphModule, function: Callable[..., Tensor], args: list[Tensor]) -> None:
    """Closer to fp64 than a rounding of the norm is: the operator rounds once."""
    exact = function(*(a.double() if a.dtype == torch.bfloat16 else a for a in args)).double()
    error = (module(*args).double() - exact).abs().max()
    assert error <= (function(*args).double() - exact).abs().max()


@pytest.mark.parametrize("first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("turn", [neighbours, halves, folded_halves, sliced_halves])
def test_a_rotated_norm_is_one_operator(turn: Callable[..., Tensor], first: bool):
    def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turn(norm(x, w), cos, sin)

    args = inputs(first)
    args[0] = torch.cat(args[:2], 2 if first else 1)
    count, module = fused(function, args)
    assert count == 1
    operators = [n for n in module.graph.nodes if n.op == "call_function"]
    if turn is not halves:  # which casts the angles
        assert [n.target for n in operators] == [torch.ops.chipmunk.rotary.default]
    same(module, function, args)


@pytest.mark.parametrize("normed", [(True, True), (False, True)])
def test_joined_norms_are_its_parts(normed: tuple[bool, bool]):
    def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = [norm(t, u) if on else t for t, u, on in zip((y, x), (v, w), normed, strict=True)]
        return neighbours(torch.cat(parts, 1), cos, sin)

    args = inputs()
    count, module = fused(function, args)
    (node,) = (n for n in module.graph.nodes if n.target is torch.ops.chipmunk.rotary.default)
    assert count == 1
    assert [w is not None for w in node.args[1]] == list(normed)
    same(module, function, args)


def read_again(x, cos, sin, w, y):
    n = norm(x, w)
    return neighbours(n, cos, sin) + n


def of_a_sum(x, cos, sin, w, y):
    return neighbours(norm(x, w) + x, cos, sin)


def without_norm(x, cos, sin, w, y):
    return neighbours(x, cos, sin)


def written_between(x, cos, sin, w, y):
    n = norm(x, w)
    y.mul_(2)
    x.mul_(2)
    return neighbours(n, cos, sin)


def other_way_round(x, cos, sin, w, y):
    n = norm(x, w)
    a, b = n.chunk(2, -1)
    return n * cos.bfloat16() + torch.cat((b, -a), -1) * sin.bfloat16()


def uneven(x, cos, sin, w, y):
    n = norm(x, w)
    return n * cos.bfloat16() + torch.cat((-n[..., 4:], n[..., :4]), -1) * sin.bfloat16()


def of_two(x, cos, sin, w, y):
    a, b = norm(y, w).chunk(2, -1)
    return norm(x, w) * cos.bfloat16() + torch.cat((-b, a), -1) * sin.bfloat16()


def over_tokens(x, cos, sin, w, y):
    return neighbours(F.rms_norm(x, x.shape[-2:], w.expand(HEADS, -1), 1e-6), cos, sin)


def stacked_before(x, cos, sin, w, y):
    n = norm(x, w)
    a, b = n.reshape(*n.shape[:-1], -1, 2).unbind(-1)
    return n * cos.bfloat16() + torch.stack([-b, a], 3).flatten(3) * sin.bfloat16()


def unbound_before(x, cos, sin, w, y):
    n = F.rms_norm(x[..., :4], (4,), w[:4], 1e-6)
    a, b = n.reshape(*n.shape[:-1], 2, 2).unbind(3)
    return n * cos[..., :4].bfloat16() + torch.stack([-b, a], 4).flatten(3) * sin[..., :4].bfloat16()


def odd_heads(x, cos, sin, w, y):
    n = F.rms_norm(x[:, :, :2, :3], (3,), w[:3], 1e-6)
    a, b = n.reshape(*n.shape[:2], 1, 3, 2).unbind(-1)
    turned = torch.stack([-b, a], -1).reshape(n.shape)
    return n * cos[..., :3].bfloat16() + turned * sin[..., :3].bfloat16()


def across(x, cos, sin, w, y):
    n = norm(x[:1, :, :1], w)
    a, b = n.reshape(1, 1, TOKENS, -1, 2).unbind(-1)
    return n * cos.bfloat16() + torch.stack([-b, a], -1).flatten(3) * sin.bfloat16()


def without_batch(x, cos, sin, w, y):
    return halves(norm(x[0], w), cos, sin)


def set_in_part(x, cos, sin, w, y):
    n = norm(x, w)
    a, b = n.chunk(2, -1)
    turned = torch.cat((-b, a), -1)
    turned[:, :3] = 0
    return n * cos.bfloat16() + turned * sin.bfloat16()


def written_before_the_cast(x, cos, sin, w, y):
    n = norm(x, w)
    a, b = n.chunk(2, -1)
    rotated = n * cos + torch.cat((-b, a), -1) * sin
    w.mul_(2)
    return rotated.to(x.dtype)


def two_weights_of_eps(x, cos, sin, w, y):
    return neighbours(
        torch.cat([F.rms_norm(t, (WIDTH,), w, e) for t, e in ((x[:, :5], 1e-6), (x[:, 5:], 1e-5))], 1), cos, sin
    )


@pytest.mark.parametrize(
    "function",
    [
        read_again,
        of_a_sum,
        without_norm,
        written_between,
        other_way_round,
        uneven,
        of_two,
        over_tokens,
        stacked_before,
        unbound_before,
        odd_heads,
        across,
        without_batch,
        set_in_part,
        written_before_the_cast,
        two_weights_of_eps,
    ],
)
def test_what_is_unlike_it_is_left_alone(function: Callable[..., Tensor]):
    x, _, w, _, cos, sin = inputs()
    x = torch.cat([x, x], 1)[:, :TOKENS]
    args = [x, cos, sin, w, x.clone()]
    with FakeTensorMode() as mode:  # tells views by their memory, as a capture does
        args = [mode.from_tensor(a) for a in args]
        before = traced(function, *args)
        module = traced(function, *args)
    assert fuse_rotary(module.graph, lambda x: True) == 0
    assert [n.target for n in module.graph.nodes] == [n.target for n in before.graph.nodes]


def test_what_is_rotated_twice_is_computed_once():
    def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return neighbours(norm(neighbours(norm(x, w), cos, sin), v), sin, cos)

    args = inputs()
    args[0] = torch.cat(args[:2], 1)
    count, module = fused(function, args)
    assert count == 2
    operators = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert operators == [torch.ops.chipmunk.rotary.default] * 2
    same(module, function, args)


def test_sizes_that_may_change_leave_it_alone_and_get_no_guard():
    x, _, w, _, cos, sin = inputs()
    args = torch.cat([x, x], 1)[:, :TOKENS], w, cos, sin
    trace = make_fx(lambda x, w, c, s: neighbours(norm(x, w), c, s), tracing_mode="symbolic", pre_dispatch=True)
    module = trace(*args)
    sizes = next(iter(module.graph.nodes)).meta["val"].fake_mode.shape_env
    before = len(sizes.guards)
    assert fuse_rotary(module.graph, lambda x: True) == 0
    assert len(sizes.guards) == before


def test_what_does_not_pay_is_left_alone():
    x, _, w, _, cos, sin = inputs()
    module = traced(lambda x, w, c, s: neighbours(norm(x, w), c, s), x, w, cos[:, :8], sin[:, :8])
    assert fuse_rotary(module.graph, lambda x: False) == 0
