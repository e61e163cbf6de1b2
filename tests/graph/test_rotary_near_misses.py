"""What is nearly a rotation as models of video write them, or is seen by others too, is left as it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.graph.rotary import fuse_rotary
from tests.graph.test_rotary import HEADS, TOKENS, WIDTH, neighbours, norm
from tests.graph.test_rotary_video import one_part, over_heads, traced_by_memory, written_out


def left_alone(function: Callable[..., Tensor], *args: Tensor) -> None:
    before, module = traced_by_memory(function, *args), traced_by_memory(function, *args)
    assert fuse_rotary(module.graph, lambda x: True) == 0
    assert [n.target for n in module.graph.nodes] == [n.target for n in before.graph.nodes]


def read_between(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    seen = out + 1
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out + seen


def seen_by_a_view(n, x, cos, sin, w):
    out = torch.empty_like(n)
    view = out.view(out.shape[0], -1)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return view * 2


def one_half_alone(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    return out


def one_half_twice(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    out[..., 0::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def halves_exchanged(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 1::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    out[..., 0::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def written_on_the_way(n, x, cos, sin, w):
    even = n[..., 0::2] * cos - n[..., 1::2] * sin
    even[:, :3] = 0
    out = torch.empty_like(n)
    out[..., 0::2] = even
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def angles_written_between(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    cos.mul_(2)
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def norm_written_between(n, x, cos, sin, w):
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    n.mul_(2)
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def input_written_between(n, x, cos, sin, w):
    x.mul_(2)
    return stacked_halves(n, cos, sin)


def weight_written_between(n, x, cos, sin, w):
    w.mul_(2)
    return stacked_halves(n, cos, sin)


def stacked_halves(n, cos, sin, dim=-1):
    a, b = n[..., 0::2], n[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim).reshape(n.shape).to(n.dtype)


def part_of_columns(n, x, cos, sin, w):
    out = torch.empty_like(n)
    cos, sin = cos[..., :4], sin[..., :4]
    out[..., 0:8:2] = n[..., 0:8:2] * cos - n[..., 1:8:2] * sin
    out[..., 1:8:2] = n[..., 0:8:2] * sin + n[..., 1:8:2] * cos
    return out


def one_column_for_all(n, x, cos, sin, w):
    a, b = n[..., 0:1:2], n[..., 1:2:2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).to(n.dtype)


def every_second_token(n, x, cos, sin, w):
    out, cos, sin = torch.empty_like(n), cos[:, :1, :, :1], sin[:, :1, :, :1]
    out[:, 0::2] = n[:, 0::2] * cos - n[:, 1::2] * sin
    out[:, 1::2] = n[:, 0::2] * sin + n[:, 1::2] * cos
    return out


def turned_back(n, x, cos, sin, w):
    a, b = n[..., 0::2], n[..., 1::2]
    return torch.stack([a * cos + b * sin, a * sin - b * cos], -1).flatten(3).to(n.dtype)


def other_angles(n, x, cos, sin, w):
    a, b = n[..., 0::2], n[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos.abs()], -1).flatten(3).to(n.dtype)


def other_values(n, x, cos, sin, w):
    a, b = n[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).to(n.dtype)


def stacked_before(n, x, cos, sin, w):
    return stacked_halves(n, cos, sin, 3)


def rounded_otherwise(n, x, cos, sin, w):
    a, b = n[..., 0::2].half(), n[..., 1::2].half()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).to(n.dtype)


def halves_rounded_otherwise(n, x, cos, sin, w):
    a, b = n[..., 0::2], n[..., 1::2]
    return torch.stack([(a * cos - b * sin).half(), (a * sin + b * cos).half()], -1).flatten(3).to(n.dtype)


def other_memory(n, x, cos, sin, w):
    out = torch.empty_like(n, dtype=torch.float32)
    out[..., 0::2] = n[..., 0::2] * cos - n[..., 1::2] * sin
    out[..., 1::2] = n[..., 0::2] * sin + n[..., 1::2] * cos
    return out


def one_token_by_many_angles(n, x, cos, sin, w):
    a, b = (norm(x[:, :1], w[:WIDTH])[..., i::2] for i in range(2))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).to(n.dtype)


def odd_width(n, x, cos, sin, w):
    n, cos, sin = F.rms_norm(x[..., :1], (1,), w[:1], 1e-6), cos[..., :1], sin[..., :1]
    out = torch.empty_like(n)
    out[..., 0::2] = n[..., 0::2] * cos
    return out


def input_written_by_out(n, x, cos, sin, w):
    torch.add(x, 1, out=x)
    return stacked_halves(n, cos, sin)


def input_written_by_foreach(n, x, cos, sin, w):
    torch._foreach_add_([x], 1.0)
    return stacked_halves(n, cos, sin)


def stack_written_afterwards(n, x, cos, sin, w):
    a, b = n[..., 0::2].float(), n[..., 1::2].float()
    both = torch.stack([(a * cos - b * sin).to(n.dtype), (a * sin + b * cos).to(n.dtype)], -1)
    out = both.flatten(3)
    both[..., 0] = 0
    return out


def stack_read_afterwards(n, x, cos, sin, w):
    a, b = n[..., 0::2].float(), n[..., 1::2].float()
    both = torch.stack([(a * cos - b * sin).to(n.dtype), (a * sin + b * cos).to(n.dtype)], -1)
    both.flatten(3)[:, :3] = 0
    return both


def read_again(n, x, cos, sin, w):
    return stacked_halves(n, cos, sin) + n


NEAR = [
    read_between,
    seen_by_a_view,
    one_half_alone,
    one_half_twice,
    halves_exchanged,
    written_on_the_way,
    angles_written_between,
    norm_written_between,
    input_written_between,
    weight_written_between,
    part_of_columns,
    one_column_for_all,
    every_second_token,
    turned_back,
    other_angles,
    other_values,
    stacked_before,
    rounded_otherwise,
    halves_rounded_otherwise,
    other_memory,
    one_token_by_many_angles,
    odd_width,
    input_written_by_out,
    input_written_by_foreach,
    stack_written_afterwards,
    stack_read_afterwards,
    read_again,
]


@pytest.mark.parametrize("norm", [written_out, over_heads])
@pytest.mark.parametrize("function", NEAR)
def test_a_rotation_unlike_it_is_left_alone(function: Callable[..., Tensor], norm: Callable[..., Tensor]):
    x, w, _, cos, sin = one_part()
    w = w.repeat(HEADS) if norm is over_heads else w
    left_alone(lambda x, w, c, s: function(norm(x, w), x, c, s, w), x, w, cos[..., ::2], sin[..., ::2])


def written_by_a_view(out):
    out.flatten(0, 1)[:, :3] = 0
    return out


def written_by_a_part_of_it(out):
    out.unbind(0)[1].flatten(0, 1)[:3] = 0
    return out


def copied_and_written(out):
    tokens = out.transpose(1, 2).contiguous()
    tokens[:, :3] = 0
    return out + tokens.transpose(1, 2)


def strided(out):
    return out.as_strided((TOKENS, WIDTH), (WIDTH, 1))


@pytest.mark.parametrize("use", [written_by_a_view, written_by_a_part_of_it, copied_and_written, strided])
def test_heads_first_are_left_alone_where_their_memory_is_told(use: Callable[..., Tensor]):
    """The operator's lie over contiguous tokens first, where what was a view is a copy and the other way round."""
    x, w, _, cos, sin = (t.transpose(1, 2).contiguous() if t.dim() == 4 else t for t in one_part())
    left_alone(lambda x, w, c, s: use(neighbours(norm(x, w), c, s)), x, w, cos, sin)
    joined = traced_by_memory(
        lambda x, w, c, s: use(torch.cat([neighbours(norm(x, w), c, s), norm(x[:, :, :1], w)], 2)), x, w, cos, sin
    )
    assert fuse_rotary(joined.graph, lambda x: True) == 1
    assert any(n.target is torch.ops.aten.cat.default for n in joined.graph.nodes)
