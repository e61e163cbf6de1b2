"""Norm and rotary position embedding of queries or keys: the operator `rotary`, one kernel a part."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import inner_contiguous, on_device_of
from chipmunk_fx.kernels.triton.numeric import cast
from chipmunk_fx.kernels.triton.tuning import padded
from chipmunk_fx.ops.rotary import empty, over_heads

VALUES = 4096  # of a program: 32 rows of a head of 128; more where a token has more, and its norm is over all heads


def rotate(
    parts: Sequence[Tensor], weights: Sequence[Tensor | None], cos: Sequence[Tensor | None], sin: Sequence[Tensor | None],
    *, eps: float, dim: int, paired: bool,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.ops.rotary.rotary`."""
    out, start = empty(parts, dim), 0
    with on_device_of(out):
        for x, weight, c, s in zip(parts, weights, cos, sin, strict=True):
            target = out.narrow(dim, start, x.shape[dim])
            start += x.shape[dim]
            whole = weight is not None and over_heads(x, weight)
            weight = None if weight is None else inner_contiguous(weight)
            _launch(*(t if dim == 1 else t.transpose(1, 2) for t in (inner_contiguous(x), target)), weight,
                    *_angles(c, s, x, dim), eps, whole, paired)  # fmt: skip
    return out


def _angles(cos: Tensor | None, sin: Tensor | None, x: Tensor, dim: int) -> tuple[Tensor | None, Tensor | None]:
    """As wide as x or half as wide, and without memory of their own for what they are alike for; tokens before heads."""
    if cos is None or sin is None:
        return None, None
    width = max(cos.shape[-1], sin.shape[-1], x.shape[-1] // 2)
    wide = (inner_contiguous(a.expand(*a.shape[:-1], width)).expand(*x.shape[:-1], width) for a in (cos, sin))
    cos, sin = (a if dim == 1 else a.transpose(1, 2) for a in wide)
    return cos, sin


def _launch(
    x: Tensor, out: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, whole: bool,
    paired: bool,
) -> None:  # fmt: skip
    """x, out, cos and sin [B, N, H, D]; whole: the norm is over all heads of a token, which stay in one program."""
    batch, rows, heads, width = x.shape
    half = padded(width // 2, 8)
    joined = padded(heads, 1) if whole else 1
    lines = max(VALUES // (2 * half), joined)
    a_token = joined if whole else heads
    turns = (0, 0, 0) if cos is None else cos.stride()[:3], (0, 0, 0) if sin is None else sin.stride()[:3]
    _rotary[(triton.cdiv(rows * a_token, lines), batch)](
        x, weight, cos, sin, out, *x.stride()[:3], *turns[0], *turns[1], *out.stride()[:3], rows, heads, a_token, eps,
        WIDTH=width, HALF=half, LINES=lines, JOINED=joined, PAIRED=paired,
        SHARED=cos is not None and 2 * cos.shape[-1] == width, num_warps=max(2 * half * lines // 1024, 4),
    )  # fmt: skip


@triton.jit
def _rotary(
    x, weight, cos, sin, out, x_b, x_n, x_h, c_b, c_n, c_h, s_b, s_n, s_h, o_b, o_n, o_h, rows, heads, a_token, eps,
    WIDTH: tl.constexpr, HALF: tl.constexpr, LINES: tl.constexpr, JOINED: tl.constexpr, PAIRED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """LINES rows of heads, neighbouring heads of a token first. Of a token `a_token` lines, JOINED of which share a norm."""
    b = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    n = (line // a_token).to(tl.int64)[:, None]
    h = (line % a_token).to(tl.int64)[:, None]
    live = (n < rows) & (h < heads)
    one, other = _halves(x + b * x_b + n * x_n + h * x_h, live, WIDTH, HALF, PAIRED)
    if weight is not None:
        squares = tl.sum(one * one, 1) + tl.sum(other * other, 1)
        if JOINED > 1:
            of_token = tl.sum(tl.reshape(squares, (LINES // JOINED, JOINED)), 1, keep_dims=True) / heads
            squares = tl.reshape(tl.broadcast_to(of_token, (LINES // JOINED, JOINED)), (LINES,))
        scale = tl.rsqrt(squares / WIDTH + eps)[:, None]
        w_one, w_other = _halves(weight + h * (WIDTH if JOINED > 1 else 0), live, WIDTH, HALF, PAIRED)
        one = one * scale * w_one
        other = other * scale * w_other
    if cos is not None:
        c_one, c_other = _turns(cos + b * c_b + n * c_n + h * c_h, live, WIDTH, HALF, PAIRED, SHARED)
        s_one, s_other = _turns(sin + b * s_b + n * s_n + h * s_h, live, WIDTH, HALF, PAIRED, SHARED)
        turned = other * c_other + one * s_other
        one = one * c_one - other * s_one
        other = turned
    target = out + b * o_b + n * o_n + h * o_h
    if PAIRED:
        column = tl.arange(0, 2 * HALF)[None, :]
        both = tl.reshape(tl.join(one, other), (LINES, 2 * HALF))
        tl.store(target + column, cast(both, out.dtype.element_ty), mask=live & (column < WIDTH))
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = live & (column < WIDTH // 2)
        tl.store(target + column, cast(one, out.dtype.element_ty), mask=inside)
        tl.store(target + WIDTH // 2 + column, cast(other, out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(line, live, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRED: tl.constexpr):
    """fp32 [LINES, HALF], twice: of the rows at `line` [LINES, 1] the even columns and the odd ones, or the first half and
    the second."""
    if PAIRED:
        column = tl.arange(0, 2 * HALF)[None, :]
        some = tl.load(line + column, mask=live & (column < WIDTH), other=0.0).to(tl.float32)
        one, other = tl.split(tl.reshape(some, (some.shape[0], HALF, 2)))
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = live & (column < WIDTH // 2)
        one = tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(line + WIDTH // 2 + column, mask=inside, other=0.0).to(tl.float32)
    return one, other


@triton.jit
def _turns(line, live, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRED: tl.constexpr, SHARED: tl.constexpr):
    """As `_halves`; SHARED: the rows have a column for each pair of them."""
    if SHARED:
        column = tl.arange(0, HALF)[None, :]
        one = tl.load(line + column, mask=live & (column < WIDTH // 2), other=0.0).to(tl.float32)
        other = one
    else:
        one, other = _halves(line, live, WIDTH, HALF, PAIRED)
    return one, other
