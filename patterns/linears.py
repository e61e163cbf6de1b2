"""x W^T + b in the spellings that models use, and the linears that are more than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chipmunk_fx.graph.language import Call, Expression, Found, Literal, OneOf, Var, Where, is_identity
from chipmunk_fx.graph.pointwise import CASTS
from chipmunk_fx.graph.walk import is_parameter, moved_by, rank, strip

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
_PARTS = (aten.select.int, aten.slice.Tensor, *CASTS)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, *CASTS)
_QUANTISED = ("aten._int_mm", "aten._scaled_mm", "aten._weight_int", "aten._mixed_dtypes_linear")
UNTRANSPOSED = ("matmul, untransposed", "matmul, untransposed, bias")
_NATIVE = ("aten.", "prims.", "chipmunk.", "<")


def linear(x: Expression, weight: str, bias: str) -> OneOf:
    """x W^T + b with W bound to `weight` and b (None where there is none) to `bias`."""
    matrix = transposed(Where(lambda node: rank(node) == 2, "a matrix", Var(weight)))
    vector = Where(lambda node: rank(node) == 1, "a bias vector", Var(bias))
    product = Call((aten.matmul.default,), {"self": x, "other": matrix})
    stored = Where(_is_stored, "a matrix", Var(weight))
    untransposed = Call((aten.matmul.default,), {"self": x, "other": stored})

    def biased(product: Expression) -> Where:
        sums = Call((aten.add.Tensor,), {"other": vector, "self": product}, commutes=("self", "other"))
        return Where(_is_biased, "a product with a bias", sums)

    return OneOf(
        f"{weight} by",
        {
            "matmul": product,
            "matmul, bias": biased(product),
            "mm": Call((aten.mm.default,), {"self": x, "mat2": matrix}),
            "addmm": Call((aten.addmm.default,), {"self": vector, "mat1": x, "mat2": matrix}),
            UNTRANSPOSED[0]: untransposed,
            UNTRANSPOSED[1]: biased(untransposed),
            "linear": Call((aten.linear.default,), {"input": x, "weight": Var(weight), "bias": Var(bias)}),
        },
    )


def transposed(inner: Expression) -> OneOf:
    """The transpose of a matrix."""
    axis = Literal(lambda value: value in (0, 1, -1, -2), "a dimension of a matrix")
    swap = Literal(lambda value: [d % 2 for d in value] == [1, 0], "both dimensions swapped")
    return OneOf(
        "transposed by",
        {
            "name": Call((aten.t.default, aten.numpy_T.default, aten.mT.default), {"self": inner}),
            "transpose": Call((aten.transpose.int,), {"self": inner, "dim0": axis, "dim1": axis}),
            "permute": Call((aten.permute.default,), {"self": inner, "dims": swap}),
        },
    )


def second_linear(x: Expression) -> Where:
    """The linear that ends an MLP; one that begins the low-rank update of another linear is a part of that one."""
    return Where(lambda node: not _is_update(node), "no low-rank update (LoRA)", linear(x, "w2", "b2"))


def first_linear(x: Expression, weight: str, bias: str) -> OneOf:
    """A linear, or what stands in its place and is refused by `linear_refusal`."""
    sum_ = Call((aten.add.Tensor,), {"self": linear(x, weight, bias), "other": Var(f"{weight} update")})
    adapted = Where(_is_adapted, "a linear with an update", sum_)
    foreign = Where(is_foreign, "a matrix product", Var(f"{weight} foreign"))
    return OneOf(f"{weight} is", {"foreign": foreign, "adapted": adapted, "linear": linear(x, weight, bias)})


def is_foreign(node: fx.Node) -> bool:
    """A product other than a linear: a quantised one (`aten._int_mm`, `torchao.…`), or an op of somebody's own."""
    name = str(node.target)
    return node.op == "call_function" and (name.startswith(_QUANTISED) or not name.startswith(_NATIVE))


def linear_refusal(found: Found) -> str | None:
    """Why the linears of a match are none that an op could take over."""
    bound = found.bound
    if node := next((value for name, value in bound.items() if name.endswith(" foreign")), None):
        return f"{node.target} ({node}) stands where a linear is supported"
    adapted = next((n for n in found.nodes if n.target in _PRODUCTS and _update(n)), None)
    if adapted is not None:
        return f"a low-rank update (LoRA) is added to {adapted}; merge it into the weight to have it computed sparsely"
    for name in ("w1", "wu", "w2"):
        weight = bound.get(name)
        if weight is None:
            continue
        if bound[f"{name} by"] in UNTRANSPOSED:
            return f"weight {weight} is kept as [in, out]; [out, in], as linears have it, is supported"
        if reason := weight_refusal(weight):
            return reason
        if rank(weight) != 2:
            return f"weight {weight} has rank {rank(weight)}, a matrix is supported"
    return None


def weight_refusal(weight: fx.Node) -> str | None:
    """Why an op could not take a weight as it is."""
    value = weight.meta["val"]
    if is_traceable_wrapper_subclass(value):
        return f"weight {weight} is a {type(value).__name__}, a plain tensor is supported"
    if changing := moved_by(weight):
        return f"weight {weight} is computed from {changing}, which may change from step to step"
    return None


def _is_stored(node: fx.Node) -> bool:
    """Whether a matrix is a parameter, or a part of one, as it is kept."""
    return rank(node) == 2 and is_parameter(strip(node, _PARTS))


def _is_biased(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and sorted(rank(n) == 1 for n in node.all_input_nodes) == [False, True]


def _is_adapted(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and any(_update(n) for n in node.all_input_nodes if n.target in _PRODUCTS)


def _update(linear: fx.Node) -> fx.Node | None:
    """The product of low rank with the same input that is added to a linear's result."""
    for user in linear.users:
        while (is_identity(user) or user.target in CASTS) and len(user.users) == 1:
            user = next(iter(user.users))
        for other in user.all_input_nodes if user.target is aten.add.Tensor else ():
            up = _unscaled(other)
            down = _unscaled(up.args[0]) if up.target is aten.linear.default else up
            twice = down is not up is not linear and down.target is aten.linear.default
            if twice and _unscaled(down.args[0]) is _unscaled(linear.all_input_nodes[0]):
                return up
    return None


def _is_update(down: fx.Node) -> bool:
    """Whether a product is the first of the two whose result is added to that of a linear with the same input."""
    up = _reader(down)
    total = None if up is None or up.target is not aten.linear.default else _reader(up)
    parts = total.all_input_nodes if total is not None and total.target is aten.add.Tensor else []
    bases = [base for part in parts if (base := _unscaled(part)) is not up and base.target in _PRODUCTS]
    return any(_update(base) is up for base in bases)


def _reader(node: fx.Node) -> fx.Node | None:
    """The only op that reads a value, behind scales and casts."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in _SCALES and not is_identity(node):
            return node
    return None


def _unscaled(node: Any) -> fx.Node:
    while node.target in _SCALES or is_identity(node):
        node = node.all_input_nodes[0]
    return node
