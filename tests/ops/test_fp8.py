"""The products of a sparse MLP in fp8: by hand from rounded values, what is kept, what is not finite, standing still."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.kernels import triton
from chipmunk_fx.ops.cases import MlpCase, call, largest_error, tolerance
from chipmunk_fx.ops.mlp import mlp_refresh, mlp_sparse
from tests.ops import oracle

CASE = MlpCase(lead=(2, 75), width=128, neurons=256, group_rows=32, columns=80, result=64, fp8=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = pytest.mark.parametrize(
    "form",
    [
        {},
        {"gated": True, "activation": "silu"},
        {"ordered": True, "biased": False, "lead": (75,)},
        {"gated": True, "biased": False, "lead": (2, 5, 15)},
    ],
    ids=["plain", "gated", "ordered", "gated, unbiased"],
)


def run(function: Any, values: dict[str, Any]) -> Tensor:
    positional, keywords = call(function.__name__, values)
    return function(*positional, **keywords)


def grid() -> Tensor:
    """Every number of e4m3 but nan, ascending."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num(0).unique()


def nearest(values: Tensor) -> Tensor:
    """The nearest number of e4m3 to each, by looking at all of them."""
    return grid()[(values.double().unsqueeze(-1) - grid()).abs().argmin(-1)]


@DTYPES
@FORMS
def test_by_hand(dtype: torch.dtype, form: dict[str, Any]):
    """One listed neuron after the other, in fp64, from the numbers of e4m3 nearest to weights and rows over their scales."""
    case = replace(CASE, **form)
    values = case.values(dtype)
    run(mlp_refresh, values)
    values["x"] = case.tokens(dtype, seed=1)
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    result = run(mlp_sparse, values)

    scales, weights = [], []
    for weight in (before["w2"].mT, before["w1"], before["wu"])[: 3 if case.gated else 2]:
        scales.append((weight.float().abs().max() * (1 / 448)).double())
        weights.append(nearest(weight.float() / scales[-1].float()))
    of_changes = before["change_scale"]
    x = oracle.batches(before["x"])
    out, wide = before["out"].double(), oracle.wide(before)
    for b, g in ((b, g) for b in range(case.batch) for g in range(values["lists"].shape[1])):
        rows = oracle.groups(values, case.rows)[g]
        part = x[b, rows].float()
        scale = part.abs().amax(1) * (1 / 448)
        eight = nearest(part / scale[:, None])
        for neuron in values["lists"][b, g].tolist():
            first = [eight @ w[neuron] * scale.double() * s for w, s in zip(weights[1:], scales[1:], strict=True)]
            if case.biased:
                first = [z + wide[name][neuron] for z, name in zip(first, ("b1", "bu"), strict=False)]
            h = oracle.ACTIVATIONS[case.activation](first[0]) * (first[1] if case.gated else 1)
            change = h - before["hidden"][b, g, neuron, : len(rows)].double()
            change = nearest(change.float() / of_changes) * of_changes.double()
            out[b, rows] += change[:, None] * weights[0][neuron] * scales[0]
    plain = oracle.sparse_mlp(before, values["lists"])[0]
    assert largest_error(values["out"], out) <= tolerance(plain, out)
    assert largest_error(result.view_as(out), out) <= tolerance(plain.to(dtype), out)


@DTYPES
def test_a_refresh_is_made_in_the_models_dtype(dtype: torch.dtype):
    with_fp8, without = CASE.values(dtype), replace(CASE, fp8=False).values(dtype)
    assert torch.equal(run(mlp_refresh, with_fp8), run(mlp_refresh, without))
    assert all(
        torch.equal(with_fp8[name].nan_to_num(), without[name].nan_to_num()) for name in ("hidden", "out", "mean")
    )


def test_a_sparse_step_reads_what_a_refresh_kept():
    """The same lists and means as without fp8; the weights themselves are read for the means alone."""
    values, without = CASE.values(torch.float32), replace(CASE, fp8=False).values(torch.float32)
    for each in (values, without):
        run(mlp_refresh, each)
        each["x"] = CASE.tokens(torch.float32, seed=1)
    kept = values["w1_fp8"].view(torch.uint8).clone(), values["scales"].clone()
    run(mlp_sparse, values)
    run(mlp_sparse, without)
    assert torch.equal(values["w1_fp8"].view(torch.uint8), kept[0]) and torch.equal(values["scales"], kept[1])
    assert torch.equal(values["lists"], without["lists"]) and torch.equal(values["mean"], without["mean"])
    assert not torch.equal(values["out"], without["out"])


def test_a_branch_reads_weights_that_another_ones_refresh_has_stored():
    """Weights and their scales are shared; weights became a quarter before the other branch had a refresh."""
    values = CASE.values(torch.float32)
    run(mlp_refresh, values)
    for name in ("w1", "w2"):
        values[name] = values[name] / 4
    own = {name: torch.full_like(values[name], torch.nan) for name in ("hidden", "out", "mean", "change_scale")}
    run(mlp_refresh, values | own | {"lists": values["lists"].clone()})
    without = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    without |= {"by_neuron": values["w2"].mT.contiguous(), "w1_fp8": None, "scales": None, "change_scale": None}
    with_fp8 = run(mlp_sparse, values)
    error = (with_fp8 - run(mlp_sparse, without)).abs().max().item()
    assert 0 < error < 0.1 * with_fp8.abs().max().item()


def test_with_every_neuron_a_step_is_a_refresh():
    case = replace(CASE, columns=CASE.neurons)
    values, without = case.values(torch.float32), replace(case, fp8=False).values(torch.float32)
    run(mlp_refresh, values)
    run(mlp_refresh, without)
    assert torch.equal(run(mlp_sparse, values), run(mlp_sparse, without))


def test_the_largest_number_is_kept_and_zeros_have_a_scale_of_one():
    values = CASE.values(torch.float32)
    values["w1"].zero_()
    run(mlp_refresh, values)
    assert values["scales"][0].item() == 1 and (values["w1_fp8"].float() == 0).all()
    values = CASE.values(torch.float32)
    values["w1"][3, 5] = 100.0
    run(mlp_refresh, values)
    assert values["w1_fp8"][0, 3, 5].item() == 448 and values["scales"][0].item() == torch.tensor(100.0) * (1 / 448)


def test_rows_of_zeros():
    values = CASE.values(torch.bfloat16)
    run(mlp_refresh, values)
    values["x"] = torch.zeros_like(values["x"])
    run(mlp_sparse, values)
    assert values["out"].isfinite().all()
    listed = values["lists"][0, 0].long()
    expected = F.gelu(values["b1"][listed], approximate="tanh")
    assert torch.equal(values["hidden"][0, 0, listed], expected[:, None].expand(-1, CASE.group_rows))


@DTYPES
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_a_row_stays_visible(dtype: torch.dtype, broken: float):
    """Every listed neuron of the row is nan, and that of no other row."""
    values = CASE.values(dtype)
    run(mlp_refresh, values)
    values["clock"][1] = 0  # the lists stay
    values["x"] = CASE.tokens(dtype, seed=1)
    values["x"][1, 40, 7] = broken
    result = run(mlp_sparse, values)
    bad = torch.zeros(2, 75, dtype=torch.bool)
    bad[1, 40] = True
    assert torch.equal(result.isnan().all(-1), bad) and torch.equal(result.isnan().any(-1), bad)
    assert values["hidden"][1, 1, values["lists"][1, 1].long(), 8].isnan().all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_weight_stays_visible(broken: float):
    values = CASE.values(torch.bfloat16)
    values["w1"][3, 5] = broken
    run(mlp_refresh, values)
    assert values["scales"][0].isfinite().logical_not().all() and values["w1_fp8"][0, 3, 5].isnan()
    values["clock"][1] = 0
    assert run(mlp_sparse, values).isnan().all()


@FORMS
@pytest.mark.parametrize("columns", [1, 80])
def test_standing_still_differs_by_rounding_to_e4m3_alone(form: dict[str, Any], columns: int):
    """By no more than what rounding to e4m3 explains at worst; what is found is a fourth of it at most.

    1.13 is the steepest of gelu and silu; |w2| takes the errors of the listed neurons to the result.
    """
    case = replace(CASE, columns=columns, random_density=0.0, **form)
    values = case.values(torch.float32)
    dense = run(mlp_refresh, values).double()
    error = (run(mlp_sparse, values).double() - dense).abs()
    x = oracle.batches(values["x"]).double()
    largest = 1.13 * oracle.worst_in_fp8(x, values["w1"].double())
    if case.gated:
        h = oracle.hidden(oracle.wide(values | {"wu": None}), x).abs()
        up = F.linear(x, values["wu"].double(), None if values["bu"] is None else values["bu"].double()).abs()
        largest = (h + largest) * (up + oracle.worst_in_fp8(x, values["wu"].double())) - h * up
    listed = torch.zeros(case.batch, case.rows, case.neurons, dtype=torch.bool)
    for g, rows in enumerate(oracle.groups(values, case.rows)):
        for b in range(case.batch):
            listed[b, rows[:, None], values["lists"][b, g].long()] = True
    allowed = (largest * listed) @ values["w2"].double().abs().mT
    assert error.max() > 1e-4
    assert (error.view_as(allowed) <= allowed / 4 + 1e-5).all()


def test_standing_still_gathers_no_errors():
    """The second step puts the same rounded values in place of those of the first."""
    values = replace(CASE, random_density=0.0).values(torch.float32)
    run(mlp_refresh, values)
    values["clock"][1] = 0
    first = run(mlp_sparse, values)
    for _ in range(5):
        torch.testing.assert_close(run(mlp_sparse, values), first, rtol=0, atol=1e-5)


def test_triton_leaves_fp8_to_others():
    values = CASE.values(torch.bfloat16)
    assert triton.supports("mlp_sparse", values) == "weights in fp8, allowed is the dtype of x"
    assert "fp8" not in (triton.refused("mlp_sparse", values) or "")
