"""Norm and rotation as models of video write them: which become one operator, that nothing else does, and the same values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from chipmunk_fx.graph.rotary import fuse_rotary
from tests.graph.capturing import captured, traced
from tests.graph.test_rotary import HEADS, WIDTH, fused, inputs, neighbours, norm, same
from tests.harness.zoo import build, cast

ROTARY = torch.ops.chipmunk.rotary.default


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def odd_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos[..., ::2], sin[..., ::2]
    out = torch.empty_like(x)
    out[..., 1::2] = cos * b + a * sin
    out[..., 0::2] = a * cos - sin * b
    return out


def views_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), cos, sin = (x[..., i::2] for i in range(2)), cos[..., ::2], sin[..., ::2]
    out = torch.empty_like(x)
    even, odd = out[..., ::2], out[..., 1::2]
    even.copy_(a * cos - b * sin)
    odd.copy_(a * sin + b * cos)
    return out


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mochi."""
    a, b, cos, sin = x[..., 0::2].float(), x[..., 1::2].float(), cos[..., ::2], sin[..., ::2]
    return torch.stack([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], dim=-1).flatten(-2)


def stacked_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).reshape(x.shape).to(x.dtype)


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    """HunyuanVideo."""
    normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(weight.dtype) * weight


def cast_last(x: Tensor, weight: Tensor) -> Tensor:
    """Mochi."""
    return (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def cast_first(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def over_heads(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight if len(weight) > WIDTH else weight.repeat(HEADS)
    return F.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).unflatten(2, (HEADS, -1))


def over_heads_written_out(x: Tensor, weight: Tensor) -> Tensor:
    return written_out(x.flatten(2), weight.repeat(HEADS)).view(x.shape)


def one_part() -> list[Tensor]:
    x, y, *rest = inputs()
    return [torch.cat([x, y], 1), *rest]


def traced_by_memory(function: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """As a capture does it, where values that are views of others tell so."""
    with FakeTensorMode() as mode:
        return traced(function, *(mode.from_tensor(a) for a in args))


def operators(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is ROTARY]


TURNS = [in_place, odd_first, views_first, stacked, stacked_wide, neighbours]
NORMS = [norm, written_out, cast_last, cast_first, over_heads, over_heads_written_out]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("turn", TURNS)
def test_every_spelling_is_one_operator(turn: Callable[..., Tensor], norm: Callable[..., Tensor], transposed: bool):
    def function(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not transposed:
            return turn(norm(x, w), cos, sin)
        return turn(norm(x, w).transpose(1, 2), cos.transpose(1, 2), sin.permute(0, 2, 1, 3))

    count, module = fused(function, one_part())
    assert count == 1
    left = {"reshape", "unflatten", "flatten", "slice", "view", "repeat", "transpose", "permute", "rotary"}
    assert {str(n.target).split(".")[1] for n in module.graph.nodes if n.op == "call_function"} <= left
    assert [n.kwargs["dim"] for n in operators(module)] == [2 if transposed else 1]
    same(module, function, one_part())


def test_angles_may_be_each_heads_own_and_have_no_batch():
    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return stacked(norm(x, w), cos, sin)

    x, w, _, cos, sin = one_part()
    angles = [a[0].expand(-1, HEADS, -1) * torch.rand(HEADS, 1) for a in (cos, sin)]
    count, module = fused(function, [x, w, *angles])
    assert count == 1
    same(module, function, [x, w, *angles])


@pytest.mark.parametrize("turn", [neighbours, in_place])
@pytest.mark.parametrize("norm", [norm, written_out, over_heads])
@pytest.mark.parametrize("first", [False, True], ids=["text last", "text first"])
def test_a_norm_that_is_rotated_in_part_is_joined(norm: Callable, turn: Callable, first: bool):
    def function(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = norm(x, w)
        image, text = (n[:, 4:], n[:, :4]) if first else (n[:, :-4], n[:, -4:])
        parts = [turn(image, cos[:, 4:], sin[:, 4:]), text]
        return torch.cat(parts[::-1] if first else parts, 1)

    count, module = fused(function, one_part())
    (node,) = operators(module)
    assert count == 1
    assert [cos is None for cos in node.args[2]] == [first, not first]
    assert not any(
        n.target in (torch.ops.aten.cat.default, torch.ops.aten.rms_norm.default) for n in module.graph.nodes
    )
    same(module, function, one_part())


def test_rotated_and_normed_parts_are_joined():
    def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = [in_place(written_out(t, w), cos[:, : t.shape[1]], sin[:, : t.shape[1]]) for t in (x, y)]
        return torch.cat([rotated[0], written_out(y, v), rotated[1]], 1)

    count, module = fused(function, inputs())
    (node,) = operators(module)
    assert count == 2
    assert [weight.name for weight in node.args[1]] == ["w_1", "v_1", "w_1"]
    same(module, function, inputs())


def test_what_was_rotated_may_be_written_to_afterwards():
    def function(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = in_place(norm(in_place(over_heads(x, w), cos, sin), v), sin, cos)
        out[:, :3] = 0
        return out + x

    count, module = fused(function, one_part())
    assert count == len(operators(module)) == 2
    same(module, function, one_part())


@pytest.mark.parametrize(("name", "count", "parts"), [("Wan", 4, 1), ("HunyuanVideo", 8, 2), ("Mochi", 4, 1)])
def test_models_have_it_in_every_block(name: str, count: int, parts: int):
    model, inputs = cast(name, *build(name), torch.bfloat16)
    module = captured(model, **inputs).capture.module
    assert fuse_rotary(module.graph, lambda x: True) == count
    assert [len(n.args[0]) for n in operators(module)] == [parts] * count


@pytest.mark.parametrize("turn", [in_place, stacked])
def test_sizes_that_may_change_and_fp32_leave_it_alone(turn: Callable[..., Tensor]):
    x, w, _, cos, sin = one_part()
    for mode, dtype in (("symbolic", torch.bfloat16), ("real", torch.float32)):
        trace = make_fx(lambda x, w, c, s: turn(written_out(x, w), c, s), tracing_mode=mode, pre_dispatch=True)
        module = trace(x.to(dtype), w.to(dtype), cos, sin)
        sizes = next(iter(module.graph.nodes)).meta["val"].fake_mode.shape_env if mode == "symbolic" else None
        before = sizes and len(sizes.guards)
        assert fuse_rotary(module.graph, lambda x: True) == 0
        assert before == (sizes and len(sizes.guards))


def set_before(rotated, text, x, y, w):
    rotated[:, :2] = 0
    return torch.cat([rotated, text], 1)


def read_beside(rotated, text, x, y, w):
    return torch.cat([rotated, text], 1)[:, :4] + rotated[:, :4]


def text_read_beside(rotated, text, x, y, w):
    return torch.cat([rotated, text], 1)[:, :4] + text


def text_changed(rotated, text, x, y, w):
    text[:, :2] = 0
    return torch.cat([rotated, text], 1)


def input_changed(rotated, text, x, y, w):
    x.mul_(2)
    return torch.cat([rotated, text], 1)


def text_input_changed(rotated, text, x, y, w):
    y.mul_(2)
    return torch.cat([rotated, text], 1)


def joined_by_heads(rotated, text, x, y, w):
    return torch.cat([rotated, torch.cat([text, text], 1)], 2)


def another_eps(rotated, text, x, y, w):
    return torch.cat([rotated, F.rms_norm(x[:, :4], (WIDTH,), w, 1e-3)], 1)


def not_normed(rotated, text, x, y, w):
    return torch.cat([rotated, x[:, :4]], 1)


def wider(rotated, text, x, y, w):
    return torch.cat([rotated, text.float()], 1)


@pytest.mark.parametrize(
    "join",
    [
        set_before,
        read_beside,
        text_read_beside,
        text_changed,
        input_changed,
        text_input_changed,
        joined_by_heads,
        another_eps,
        not_normed,
        wider,
    ],
)
def test_what_is_not_simply_joined_is_not(join: Callable[..., Tensor]):
    def apart(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, y = x.clone(), x[:, :4].clone()
        return join(stacked(norm(x[:, 4:], w), cos[:, 4:], sin[:, 4:]), norm(y, v), x, y, w)

    def together(x: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.clone()
        n = written_out(x, w)
        return join(stacked(n[:, 4:], cos[:, 4:], sin[:, 4:]), n[:, :4], x, x, w)

    for function in (apart, together):
        module = traced_by_memory(function, *one_part())
        assert fuse_rotary(module.graph, lambda x: True) == 1 or function is together
        assert any(n.target is torch.ops.aten.cat.default for n in module.graph.nodes)
        module.recompile()
        same(module, function, one_part())
