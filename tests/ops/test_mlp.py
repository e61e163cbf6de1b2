"""Laws of the MLP operators: standing still, full density, repeated steps, kept lists."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_fx.ops.activations import ACTIVATIONS, activation
from chipmunk_fx.ops.cases import MlpCase, call, largest_error, tolerance
from chipmunk_fx.ops.mlp import mlp_refresh, mlp_sparse
from tests.ops import oracle

CASE = MlpCase(lead=(2, 150), width=64, neurons=256, group_rows=32, columns=80, result=64)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"gated": True, "activation": "silu"}, {"ordered": True, "biased": False}],
    ids=["plain", "gated", "ordered"],
)


def refresh(values: dict[str, Any]) -> Tensor:
    positional, keywords = call("mlp_refresh", values)
    return mlp_refresh(*positional, **keywords)


def sparse(values: dict[str, Any]) -> Tensor:
    positional, keywords = call("mlp_sparse", values)
    return mlp_sparse(*positional, **keywords)


def assert_dense(result: Tensor, values: dict[str, Any]) -> None:
    exact = oracle.mlp(oracle.wide(values))
    assert largest_error(result.view_as(exact), exact) <= tolerance(oracle.mlp(values), exact)


@DTYPES
@FORMS
@pytest.mark.parametrize("columns", [1, 80, 256])
def test_standing_still_gives_the_dense_result(dtype: torch.dtype, form: dict[str, Any], columns: int):
    values = replace(CASE, columns=columns, **form).values(dtype)
    refresh(values)
    for _ in range(3):
        assert_dense(sparse(values), values)


@DTYPES
@FORMS
def test_with_every_neuron_each_step_is_dense(dtype: torch.dtype, form: dict[str, Any]):
    case = replace(CASE, columns=CASE.neurons, **form)
    values = case.values(dtype)
    refresh(values)
    for step in range(1, 10):
        values["x"] = case.tokens(dtype, seed=step)
        assert_dense(sparse(values), values)


def test_repeated_steps_reach_the_dense_result():
    """Neurons that have not been computed yet have changed most, so standing inputs converge."""
    values = replace(CASE, random_density=0.0).values(torch.float32)
    refresh(values)
    values["x"] = CASE.tokens(torch.float32, seed=1)
    exact = oracle.mlp(oracle.wide(values))
    errors = [largest_error(sparse(values).view_as(exact), exact) for _ in range(4)]
    assert errors[0] > 1e-2 and errors[-1] < 1e-5


def test_kept_lists_still_follow_the_input():
    values = CASE.values(torch.float32)
    refresh(values)
    values["x"] = CASE.tokens(torch.float32, seed=1)
    first = sparse(values)
    lists = values["lists"].clone()
    values["clock"][1] = 0
    values["x"] = CASE.tokens(torch.float32, seed=2)
    second = sparse(values)
    assert torch.equal(values["lists"], lists)
    assert not torch.equal(first, second)


def test_a_result_is_not_the_cache():
    values = CASE.values(torch.float32)
    for step in (refresh, sparse):
        result = step(values)
        assert result.shape == (2, 150, 64) and result.is_contiguous()
        assert result.untyped_storage().data_ptr() != values["out"].untyped_storage().data_ptr()


def test_the_generator_is_left_alone():
    values = CASE.values(torch.float32)
    state = torch.get_rng_state()
    refresh(values)
    sparse(values)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_make_new_tensors(name: str):
    x = torch.linspace(-3, 3, 50)
    assert activation(name)(x).data_ptr() != x.data_ptr()


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match="'swish' is unknown; known are gelu, gelu_tanh"):
        activation("swish")
