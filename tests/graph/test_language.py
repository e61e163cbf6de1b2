"""The pattern language: what matches, what does not, and what a mismatch says."""

import pytest
import torch
import torch.nn.functional as F

from chipmunk_fx.graph.language import (
    Among,
    Call,
    Each,
    Found,
    Function,
    Literal,
    Mismatch,
    Named,
    OneOf,
    Range,
    Var,
    Where,
    arguments,
    heads,
    is_identity,
    match,
)
from tests.graph.capturing import last, traced

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
QKV = {"query": Var("q"), "key": Var("k"), "value": Var("v")}
LINEAR = Call((aten.linear.default,), {"input": Var("x"), "weight": Var("w"), "bias": Var("b")})


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 4)))


def attempt(expression, function, *args) -> Found | Mismatch:
    """Match against the node that the function returns."""
    output = next(n for n in traced(function, *args).graph.nodes if n.op == "output")
    return match(expression, output.args[0])


def found(expression, function, *args) -> Found:
    result = attempt(expression, function, *args)
    assert isinstance(result, Found), str(result)
    return result


def missed(expression, function, *args) -> Mismatch:
    result = attempt(expression, function, *args)
    assert isinstance(result, Mismatch), result
    return result


def test_variables_bind_the_arguments():
    bound = found(Call((SDPA,), QKV), F.scaled_dot_product_attention, x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8)).bound
    assert [node.op for node in bound.values()] == ["placeholder"] * 3
    assert list(bound) == ["q", "k", "v"]


def test_a_forgotten_scale_is_a_mismatch():
    q = x(1, 2, 4, 8)
    mismatch = missed(Call((SDPA,), QKV), lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.5), q)
    assert "scale=0.5" in str(mismatch) and "scale=None" in str(mismatch)
    named = Call((SDPA,), QKV | {"scale": Var("scale")})
    assert found(named, lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.5), q).bound["scale"] == 0.5
    assert found(named, lambda q: F.scaled_dot_product_attention(q, q, q), q).bound["scale"] is None


def test_a_forgotten_mask_is_a_mismatch():
    q, mask = x(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    mismatch = missed(Call((SDPA,), QKV), lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask), q, mask)
    assert "attn_mask" in str(mismatch)


def test_a_forgotten_approximation_is_a_mismatch():
    gelu = Call((aten.gelu.default,), {"self": Var("x")})
    assert "approximate='tanh'" in str(missed(gelu, lambda x: F.gelu(x, approximate="tanh"), x()))
    assert found(gelu, lambda x: F.gelu(x, approximate="none"), x())


def test_a_default_written_out_is_the_default():
    q = x(1, 2, 4, 8)
    assert found(Call((SDPA,), QKV), lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.0, scale=None), q)


def test_a_required_argument_that_is_not_named_is_a_mismatch():
    assert "weight=" in str(missed(Call((aten.linear.default,), {"input": Var("x")}), F.linear, x(), x(3, 4)))


def test_a_name_that_comes_again_is_the_same_node():
    square = Call((aten.mul.Tensor,), {"self": Var("a"), "other": Var("a")})
    assert found(square, lambda a: a * a, x())
    assert "same a as before" in str(missed(square, lambda a, b: a * b, x(), x()))


def test_literals_are_constants_that_pass_a_test():
    power = Call((aten.pow.Tensor_Scalar,), {"self": Var("x"), "exponent": Literal(lambda n: n == 2, "exponent 2")})
    assert found(power, lambda a: a**2, x())
    assert "wanted exponent 2, saw 3" in str(missed(power, lambda a: a**3, x()))
    product = Call((aten.mul.Tensor,), {"self": Var("x"), "other": Literal(lambda n: True, "a constant")})
    assert "wanted a constant" in str(missed(product, lambda a, b: a * b, x(), x()))


def test_the_first_alternative_that_matches_is_named():
    choice = OneOf("act", {"relu": Call((aten.relu.default,), {"self": Var("x")}), "anything": Var("x")})
    assert found(choice, lambda a: a.relu(), x()).bound["act"] == "relu"
    assert found(choice, lambda a: a.neg(), x()).bound["act"] == "anything"


def test_a_product_matches_in_either_order():
    gated = Call(
        (aten.mul.Tensor,),
        {"self": Call((aten.silu.default,), {"self": Var("gate")}), "other": Var("up")},
        commutes=("self", "other"),
    )
    for function in (lambda a, b: F.silu(a) * b, lambda a, b: b * F.silu(a)):
        result = found(gated, function, x(), x())
        assert result.bound["gate"].name.startswith("a_") and result.bound["up"].name.startswith("b_")


def test_a_choice_is_taken_back_where_a_later_argument_needs_another():
    twice = Call(
        (aten.add.Tensor,),
        {
            "self": Call((aten.mul.Tensor,), {"self": Var("a"), "other": Var("b")}, commutes=("self", "other")),
            "other": Var("a"),
        },
    )
    result = found(twice, lambda p, q: p * q + q, x(), x())
    assert result.bound["a"].name.startswith("q_") and result.bound["b"].name.startswith("p_")
    assert missed(twice, lambda p, q, r: p * q + r, x(), x(), x())


def test_among_finds_its_element_and_keeps_the_others_in_order():
    parts = Among(Call((aten.relu.default,), {"self": Var("x")}), "index", "others")
    joined = Call((aten.cat.default,), {"tensors": parts, "dim": Var("dim")})
    bound = found(joined, lambda a, b, c: torch.cat([a, b.relu(), c], -1), x(), x(), x()).bound
    assert bound["index"] == 1 and [node.name[0] for node in bound["others"]] == ["a", "c"]
    assert "aten.relu.default" in str(missed(joined, lambda a, b: torch.cat([a, b], -1), x(), x()))


def test_each_matches_a_list_of_its_length_one_by_one():
    pair = Call(
        (aten.cat.default,),
        {"tensors": Each((Var("first"), Call((aten.relu.default,), {"self": Var("first")}))), "dim": Var("dim")},
    )
    assert found(pair, lambda a: torch.cat([a, a.relu()]), x()).bound["dim"] == 0
    assert "same first as before" in str(missed(pair, lambda a, b: torch.cat([a, b.relu()]), x(), x()))
    assert "a list of 2" in str(missed(pair, lambda a: torch.cat([a, a.relu(), a]), x()))


def test_an_output_of_many_is_told_by_its_number():
    halves = {"chunks": Var("n"), "dim": Var("dim")}
    second = Call((aten.chunk.default,), {"self": Var("x"), **halves}, output=1)
    assert found(second, lambda a: a.chunk(2, -1)[1], x())
    assert "output 1" in str(missed(second, lambda a: a.chunk(2, -1)[0], x()))


def test_a_condition_is_tried_before_what_it_guards():
    wide = Where(lambda node: node.meta["val"].shape[-1] > 4, "more than 4 columns", LINEAR)
    assert found(wide, F.linear, x(), x(8, 4))
    mismatch = missed(wide, F.linear, x(), x(3, 4))
    assert mismatch.wanted == "more than 4 columns" and mismatch.depth == 0


def test_a_range_binds_the_columns_of_what_matches():
    halves = Call((aten.mul.Tensor,), {"self": Range("a", LINEAR), "other": Range("b", LINEAR)})
    bound = found(halves, lambda x, w: (h := F.linear(x, w))[..., 2:] * h.chunk(2, -1)[0], x(), x(4, 4)).bound
    assert [(bound[name].start, bound[name].stop) for name in "ab"] == [(2, 4), (0, 2)]
    whole = found(halves, lambda x, w: (h := F.linear(x, w)) * h, x(), x(4, 4))
    assert whole.bound["a"] is None and whole.bound["b"] is None
    assert "aten.linear.default" in str(
        missed(halves, lambda x, w: (h := F.linear(x, w))[:, 2:] * h[:, :2], x(), x(4, 4))
    )


def test_a_range_of_a_range_is_one():
    nested = found(Range("a", LINEAR), lambda x, w: F.linear(x, w).split([2, 6], -1)[1].chunk(3, -1)[2], x(), x(8, 4))
    assert (nested.bound["a"].start, nested.bound["a"].stop) == (6, 8)
    assert [n.target for n in nested.nodes if n.op == "call_function"][-1] is aten.linear.default


def test_a_function_is_known_by_its_values():
    twice = Function("f", {"double": lambda x: 2 * x, "square": torch.square}, LINEAR, "twice or squared")
    assert found(twice, lambda x, w: (h := F.linear(x, w)) + h, x(), x(4, 4)).bound["f"] == "double"
    assert found(twice, lambda x, w: F.linear(x, w).double() ** 2, x(), x(4, 4)).bound["f"] == "square"
    mismatch = missed(twice, lambda x, w: F.linear(x, w) ** 3, x(), x(4, 4))
    assert (mismatch.wanted, mismatch.seen, mismatch.depth) == ("twice or squared", "pow 3", 2)
    assert missed(twice, lambda x, w: F.linear(x, w), x(), x(4, 4)).wanted == "twice or squared"


def test_a_pattern_may_begin_with_any_of_its_alternatives():
    relu = Call((aten.relu.default,), {"self": Var("x")})
    assert heads(OneOf("either", {"linear": LINEAR, "guarded": Where(lambda node: True, "", relu)})) == (
        aten.linear.default,
        aten.relu.default,
    )
    with pytest.raises(TypeError, match="begins with a Call"):
        heads(Var("x"))


def test_ops_that_change_no_value_are_passed():
    def through(a, w):
        return F.dropout(F.linear(a, w).contiguous().clone().detach().to(torch.float32), 0.1, training=False)

    result = found(LINEAR, through, x(), x(3, 4))
    assert result.nodes[-1].target is aten.linear.default
    assert all(is_identity(node) for node in result.nodes[:-1]) and len(result.nodes) > 3


def test_ops_that_change_values_are_not_passed():
    for function in (
        lambda a, w: F.linear(a, w).to(torch.float64),
        lambda a, w: F.linear(a, w).bfloat16(),
        lambda a, w: F.dropout(F.linear(a, w), 0.1, training=True),
        lambda a, w: F.linear(a, w).mT,
        lambda a, w: F.linear(a, w) * 1.0,
    ):
        assert "aten.linear.default" in str(missed(LINEAR, function, x(), x(3, 4)))


def test_a_dropout_of_nothing_is_passed_in_training_too():
    assert found(LINEAR, lambda a, w: F.dropout(F.linear(a, w), 0.0, training=True), x(), x(3, 4))


def test_the_deepest_mismatch_is_the_one_reported():
    deep = Call((aten.linear.default,), {"input": OneOf("act", {
        "gelu of relu": Call((aten.gelu.default,), {"self": Call((aten.relu.default,), {"self": Var("x")})}),
        "silu": Call((aten.silu.default,), {"self": Var("x")}),
    }), "weight": Var("w"), "bias": Var("b")})  # fmt: skip
    mismatch = missed(deep, lambda a, w: F.linear(F.gelu(a.neg()), w), x(), x(3, 4))
    assert mismatch.wanted == "aten.relu.default" and mismatch.seen.startswith("aten.neg.default")
    assert mismatch.node is not None and mismatch.node.target is aten.neg.default


def test_arguments_are_known_by_schema_name():
    module = traced(lambda a, w: F.gelu(F.linear(a, w), approximate="tanh"), x(), x(3, 4))
    assert arguments(last(module, aten.gelu.default))["approximate"] == "tanh"
    assert arguments(last(module, aten.linear.default))["bias"] is None


def test_what_is_named_occurs_again_itself_or_by_an_alias():
    expression = Call(
        (aten.sub.Tensor,), {"self": Named("s", Call((aten.sin.default,), {"self": Var("x")})), "other": Var("s")}
    )
    x = torch.randn(3)
    for function in (lambda x: (s := x.sin()) - s, lambda x: (s := x.sin()) - s.detach()):
        graph = traced(function, x)
        found = match(expression, last(graph, aten.sub.Tensor))
        assert isinstance(found, Found) and found.bound["s"] is last(graph, aten.sin.default)
    for function in (lambda x: x.sin() - x.sin(), lambda x: (s := x.sin()) - s.clone(), lambda x: x.cos() - x.cos()):
        assert isinstance(match(expression, last(traced(function, x), aten.sub.Tensor)), Mismatch)
