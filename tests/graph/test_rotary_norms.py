"""What is nearly a norm of heads before a rotation, or is read by others too, is left as it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graph.test_rotary import HEADS, TOKENS, WIDTH, neighbours, norm
from tests.graph.test_rotary_near_misses import left_alone
from tests.graph.test_rotary_video import in_place, one_part, over_heads, written_out


def weights_by_head(x, w):
    return written_out(x, w.repeat(HEADS, 1))


def one_weight(x, w):
    return written_out(x, w[:1])


def mean_over_heads_alone(x, w):
    return (x * torch.rsqrt(x.float().pow(2).mean(2, keepdim=True) + 1e-6)).to(x.dtype) * w


def mean_of_all(x, w):
    return (x * torch.rsqrt(x.float().pow(2).mean(None, keepdim=True) + 1e-6)).to(x.dtype) * w


def mean_of_cubes(x, w):
    return (x * torch.rsqrt(x.float().pow(3).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def mean_rounded(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def mean_of_others(x, w):
    return (x * torch.rsqrt((x + 1).float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def mean_changed(x, w):
    mean = x.float().pow(2).mean(-1, keepdim=True)
    mean[:, :3] = 1
    return (x * torch.rsqrt(mean + 1e-6)).to(x.dtype) * w


def changed_before_its_weight(x, w):
    n = (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    n[:, :3] = 1
    return n * w


def eps_that_is_computed(x, w):
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + w.sum().abs())).to(x.dtype) * w


def rounded_to_another_dtype(x, w):
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).half().to(x.dtype) * w


def rounded_before_its_weight(x, w):
    return ((x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).half() * w).to(x.dtype)


def wider_than_its_input(x, w):
    return written_out(x, w.float())


def heads_out_of_order(x, w):
    return over_heads(x, w).reshape(x.shape[0], HEADS, TOKENS, WIDTH).transpose(1, 2)


def some_heads_of_all(x, w):
    return over_heads(x, w)[:, :, 1:]


def some_columns(x, w):
    return torch.cat([norm(x, w)[..., 2:], norm(x, w)[..., :2]], -1)


def over_batch(x, w):
    return norm(x, w).transpose(0, 2)[:2].transpose(0, 2)


NORMS_UNLIKE_IT = [
    weights_by_head,
    one_weight,
    mean_over_heads_alone,
    mean_of_all,
    mean_of_cubes,
    mean_rounded,
    mean_of_others,
    mean_changed,
    changed_before_its_weight,
    eps_that_is_computed,
    rounded_to_another_dtype,
    rounded_before_its_weight,
    wider_than_its_input,
    heads_out_of_order,
    some_heads_of_all,
    some_columns,
    over_batch,
]


@pytest.mark.parametrize("turn", [in_place, neighbours])
@pytest.mark.parametrize("norm", NORMS_UNLIKE_IT)
def test_a_norm_unlike_it_is_left_alone(norm: Callable[..., Tensor], turn: Callable[..., Tensor]):
    x, w, _, cos, sin = one_part()
    left_alone(lambda x, w, c, s: turn(norm(x, w), c, s), x, w, cos, sin)


def rest_read_elsewhere(x, w, cos, sin):
    n = written_out(x, w)
    return torch.cat([neighbours(n[:, 4:], cos[:, 4:], sin[:, 4:]), n[:, :4]], 1), n[:, :2]


def joined_and_read(x, w, cos, sin):
    n = torch.cat([written_out(t, w) for t in (x[:, :4], x[:, 4:])], 1)
    return neighbours(n, cos, sin) + n


def heads_as_tokens(x, w, cos, sin):
    n = F.rms_norm(x.flatten(2), (HEADS * WIDTH,), w.repeat(HEADS), 1e-6).reshape(x.shape[0], -1, 1, WIDTH)
    return neighbours(n, *(angles.repeat(1, HEADS, 1, 1) for angles in (cos, sin)))


@pytest.mark.parametrize("function", [rest_read_elsewhere, joined_and_read, heads_as_tokens])
def test_norms_that_are_read_otherwise_are_left_alone(function: Callable[..., Tensor]):
    x, w, _, cos, sin = one_part()
    left_alone(function, x, w, cos, sin)
