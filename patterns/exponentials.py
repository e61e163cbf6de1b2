"""A softmax over keys written out: exponentials of scores, and what divides by their sum."""

from __future__ import annotations

import torch
from torch import fx

from chipmunk_fx.graph.calls import CASTS
from chipmunk_fx.graph.language import Call, Expression, Literal, Named, OneOf, Var, Where
from chipmunk_fx.graph.walk import shape, strip
from chipmunk_fx.patterns.activations import cast

aten = torch.ops.aten

OVER = (aten.div.Tensor, aten.div_.Tensor)


def shifted(scores: Expression) -> OneOf:
    """Scores, or scores less the maximum of each row or of all: a softmax does not change with it. Casts may stand before."""
    given = {"self": Var("unshifted"), "dim": Var("maximum dim"), "keepdim": Var("maximum keepdim")}
    maximum = {
        "amax": Call((aten.amax.default,), given),
        "max": Call((aten.max.dim,), given, output=0),
        "max of all": Call((aten.max.default,), {"self": Var("unshifted")}),
    }
    top = Where(
        lambda node: shape(node)[-1:] in ((), (1,)),
        "a maximum over the last dimension (keys)",
        OneOf("maximum", maximum),
    )
    less = Call((aten.sub.Tensor, aten.sub_.Tensor), {"self": Named("unshifted", cast("scaled", scores)), "other": top})
    return OneOf("shift", {"maximum": less, "none": cast("scaled", scores)})


def exponentials(scores: Expression) -> OneOf:
    """exp of scores, which may be less their maximum. Casts may stand before and after."""
    exp = Call((aten.exp.default, aten.exp_.default), {"self": shifted(scores)})
    return cast("mixed", Named("exponentials", cast("summed", exp)))


def _is_total(node: fx.Node) -> bool:
    """Whether one number a row stands for all keys; the row's dimension comes last but one."""
    given = node.args[0] if node.target is aten.unsqueeze.default else node
    return isinstance(given, fx.Node) and given.target is aten.sum.dim_IntList and shape(node)[-1] == 1


def is_divided(node: fx.Node) -> bool:
    return node.target in OVER and isinstance(node.args[1], fx.Node) and _is_total(strip(node.args[1], CASTS))


def _total() -> Expression:
    last = Literal(lambda value: value in ([-1], [2], [3]), "a sum over the last dimension (keys)")
    given = {"self": Var("exponentials"), "dim": last, "keepdim": Var("kept"), "dtype": Var("sum dtype")}
    sums = Call((aten.sum.dim_IntList,), given)
    behind = Literal(lambda value: value in (-1, 2, 3), "a last dimension of size 1")
    spread = Call((aten.unsqueeze.default,), {"self": sums, "dim": behind})
    totals = OneOf("total", {"kept": sums, "spread": spread})
    return cast("total", Where(_is_total, "a sum over the last dimension (keys)", totals))


TOTAL = _total()
