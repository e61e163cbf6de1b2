"""RMS norms of queries and keys, over each head or over all of them, as one op or written out, and seen through views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments, dtype
from chipmunk_fx.graph.language import Call, Expression, Found, Literal, OneOf, Var, Where, match
from chipmunk_fx.graph.spellings import maybe_cast, maybe_wide
from chipmunk_fx.graph.walk import rank, shape

aten = torch.ops.aten

_FOLDS = (aten.unflatten.int, aten.reshape.default, aten.view.default)
_VIEWS = (aten.slice.Tensor, aten.transpose.int, aten.permute.default, *_FOLDS)


def _written_out() -> Expression:
    """x rsqrt(mean(x^2) + eps) weight, cast where models cast."""
    x = maybe_wide(Var("x"))
    two = Literal(lambda exponent: exponent == 2, "2")
    squares = OneOf(
        "squares",
        {
            "pow": Call((aten.pow.Tensor_Scalar,), {"self": x, "exponent": two}),
            "square": Call((aten.square.default,), {"self": x}),
            "mul": Call((aten.mul.Tensor,), {"self": x, "other": x}),
        },
    )
    last = Literal(lambda dims: list(dims or ()) == [-1], "the last dimension")
    kept = Literal(lambda keepdim: keepdim is True, "keepdim")
    mean = Call((aten.mean.dim,), {"self": squares, "dim": last, "keepdim": kept})
    scale = Call((aten.rsqrt.default,), {"self": Call((aten.add.Tensor,), {"self": mean, "other": Var("eps")})})
    exact = Where(lambda node: dtype(node) == torch.float32, "a mean in fp32", scale)
    normed = Call((aten.mul.Tensor,), {"self": x, "other": exact}, commutes=("self", "other"))
    weight = {"self": maybe_cast(normed), "other": Var("weight")}
    return maybe_cast(Call((aten.mul.Tensor,), weight, commutes=("self", "other")))


_WRITTEN_OUT = _written_out()


@dataclass(frozen=True)
class Norm:
    """weight x / sqrt(mean(x^2) + eps) over x's last dimension, of x = `source` [B, N, H, D], [B, H, N, D] or [B, N, H D].

    views: what makes heads of the normed values, and picks of their tokens, first to last. nodes: all that is not x or weight.
    """

    source: fx.Node
    weight: fx.Node
    eps: float
    nodes: tuple[fx.Node, ...]
    views: tuple[fx.Node, ...] = ()


def find_norm(value: fx.Node, dim: int, may_read: Callable[[fx.Node], bool]) -> Norm | None:
    """The norm that `value`, whose tokens lie along `dim`, is a view of. Only users that `may_read` may have its values."""
    views: list[fx.Node] = []
    while is_static(value) and all(user in views[:1] or may_read(user) for user in value.users):
        if norm := _norm(value):
            return replace(norm, nodes=(*norm.nodes, *views), views=tuple(views))
        before = _tokens_before(value, dim)
        if before is None:
            return None
        views.insert(0, value)
        value, dim = value.all_input_nodes[0], before
    return None


def is_static(node: fx.Node) -> bool:
    """Whether it is one tensor whose sizes are known."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def _tokens_before(view: fx.Node, dim: int) -> int | None:
    """Along which dimension the tokens of what is viewed lie; None where its heads or their columns are not left whole."""
    if view.target not in _VIEWS or len(view.all_input_nodes) != 1 or not is_static(view.all_input_nodes[0]):
        return None
    given, (source,) = arguments(view), view.all_input_nodes
    if view.target is aten.slice.Tensor:
        return dim if given["dim"] % rank(view) == dim else None
    if view.target is aten.transpose.int:
        swapped = rank(view) == 4 and {given["dim0"] % 4, given["dim1"] % 4} == {1, 2}
        return 3 - dim if swapped else None
    if view.target is aten.permute.default:
        return 3 - dim if [d % rank(view) for d in given["dims"]] == [0, 2, 1, 3] else None
    folded = rank(view) == 4 and rank(source) == 3 and shape(view)[:2] == shape(source)[:2]
    return dim if folded and dim == 1 else None


def _norm(node: fx.Node) -> Norm | None:
    if node.target is aten.rms_norm.default:
        given = arguments(node)
        x, weight, eps, nodes = given["input"], given["weight"], given["eps"], (node,)
        if len(given["normalized_shape"]) != 1:
            return None
    else:
        found = match(_WRITTEN_OUT, node)
        if not isinstance(found, Found):
            return None
        x, weight, eps = (found.bound[name] for name in ("x", "weight", "eps"))
        nodes = found.nodes
    if not isinstance(eps, float) or not all(isinstance(n, fx.Node) and is_static(n) for n in (x, weight)):
        return None
    if rank(x) not in (3, 4) or shape(x) != shape(node) or shape(weight) != shape(x)[-1:]:
        return None
    return Norm(x, weight, eps, nodes) if all(is_within(n, x) for n in (node, *nodes)) else None


def is_within(node: fx.Node, x: fx.Node) -> bool:
    """Whether what is made of x on the way lies where x does, in its dtype or a wider one."""
    value, given = node.meta.get("val"), x.meta["val"]
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (list, tuple))
    return value.device == given.device and value.dtype in (given.dtype, torch.float32, torch.float64)
