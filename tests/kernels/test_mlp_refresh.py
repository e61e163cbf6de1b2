"""What a refresh of an MLP keeps: weights that stay while they are as they were, means without a product of their own.

In Triton's interpreter where there is no GPU, fp8 too, which kernels/hopper takes alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import chipmunk_fx.kernels.triton as backend
from chipmunk_fx.kernels.triton import mlp
from chipmunk_fx.kernels.triton.weights import find_changes
from chipmunk_fx.ops.cases import MlpCase, arguments, largest_error, tolerance
from chipmunk_fx.ops.fp8 import rounded, scale_for
from chipmunk_fx.ops.library import REFERENCE
from chipmunk_fx.ops.mlp import mlp_sparse
from tests.ops import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = MlpCase(lead=(24,), width=64, neurons=150, group_rows=16, columns=48, result=64)
UNSEEN = 0, slice(16, 32)  # neurons and columns between the diagonals of samples of CASE's weights
FORMS = [
    (torch.bfloat16, {}),
    (torch.float32, {"gated": True, "narrow": True}),
    (torch.bfloat16, {"fp8": True}),
    (torch.bfloat16, {"fp8": True, "gated": True, "narrow": True, "activation": "silu"}),
]
forms = pytest.mark.parametrize(("dtype", "form"), FORMS, ids=["bf16", "gated", "fp8", "gated, fp8"])


def refresh(values: dict[str, Any], first: bool = False) -> Tensor:
    values["clock"][1] = int(first)
    return backend.mlp_refresh(**arguments("mlp_refresh", values))


def refreshed(dtype: torch.dtype, form: dict[str, Any]) -> dict[str, Any]:
    values = replace(CASE, **form).values(dtype, DEVICE)
    refresh(values, first=True)
    return values


def kept(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights as they are kept, [F, C] each, with the name of what they are made of."""
    yield "w2", values["by_neuron"]
    if values["w1_fp8"] is not None:
        yield from zip(("w1", "wu"), values["w1_fp8"], strict=False)


def assert_stored(values: dict[str, Any]) -> None:
    """Weights are kept as plain PyTorch stores them into buffers with anything in them."""
    names = ("hidden", "out", "mean", "lists", "by_neuron", "w1_fp8", "scales", "change_scale")
    case = replace(CASE, gated=values["wu"] is not None, fp8=values["scales"] is not None)
    plain = values | {name: case.values(values["x"].dtype, DEVICE)[name] for name in names}
    REFERENCE["mlp_refresh"](**arguments("mlp_refresh", plain))
    for (_, ours), (_, theirs) in zip(kept(values), kept(plain), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert not case.fp8 or torch.equal(values["scales"], plain["scales"])


@forms
def test_weights_that_are_as_before_are_not_stored(dtype: torch.dtype, form: dict[str, Any]):
    """As marks tell where no sample is taken."""
    values = refreshed(dtype, form)
    assert_stored(values)
    for _, weight in kept(values):
        weight[UNSEEN] = 3.0
    scales = [None if values[name] is None else values[name].clone() for name in ("scales", "change_scale")]
    values["x"] = 2 * values["x"]
    result = refresh(values)
    assert all((weight[UNSEEN].float() == 3).all() for _, weight in kept(values))
    exact = oracle.mlp(oracle.wide(values))
    assert largest_error(result.view_as(exact), exact) <= tolerance(oracle.mlp(values), exact)
    if scales[0] is not None:
        assert torch.equal(values["scales"], scales[0]) and not torch.equal(values["change_scale"], scales[1])
    refresh(values, first=True)
    assert_stored(values)


@forms
@pytest.mark.parametrize("part", [0, 1, 2])
def test_weights_that_were_changed_in_place_are_stored(dtype: torch.dtype, form: dict[str, Any], part: int):
    values = refreshed(dtype, form)
    names = [name for name, _ in kept(values)]
    if part >= len(names):
        pytest.skip("no such weight is kept")
    weight = values[names[part]]
    weight.data += 0.05 * torch.randn_like(weight[:, :1]) * torch.randn_like(weight[:1])  # a LoRA of rank 1
    refresh(values)
    assert_stored(values)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_row_or_a_column_alone_is_noticed(part: int, dim: int):
    values = refreshed(*FORMS[-1])
    name, _ = list(kept(values))[part]
    for place in (0, 50, values[name].shape[dim] - 1):
        values[name].data.select(dim, place).neg_()
        refresh(values)
        assert_stored(values)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("neurons", "width"), [(130, 70), (30, 300), (500, 20), (1, 1)])
def test_samples_meet_each_row_and_column_several_times(neurons: int, width: int, fp8: bool):
    """Half of its values suffice: of a row 32 are met, of a column of 64 neurons or more 128, or all that there are."""
    generator = torch.Generator().manual_seed(0)
    weight = 1 + torch.rand(neurons, width, generator=generator).to(DEVICE, torch.bfloat16)
    scale = scale_for(weight.max()) if fp8 else None
    before = weight.clone() if scale is None else rounded(weight, scale)
    assert not changed(weight.mT.contiguous().mT, before, scale) and changed(weight, before, scale, first=True)
    for dim, size in enumerate(weight.shape):
        for place in range(0, size, -(-size // 9)):
            other = weight.clone()
            line = other.select(dim, place)
            line[torch.randperm(len(line), generator=generator)[: -(-len(line) // 2)]] *= -1
            assert changed(other, before, scale)


def changed(weight: Tensor, before: Tensor, scale: Tensor | None, first: bool = False) -> bool:
    stale = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    find_changes(weight, before, scale, torch.tensor([3, int(first)], device=DEVICE), stale)
    return bool(stale)


@forms
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_nothing_behind(dtype: torch.dtype, form: dict[str, Any], broken: float):
    """In fp8 wherever they were: all others were rounded under a scale that is not finite either."""
    values = refreshed(dtype, form)
    for name, _ in kept(values):
        weight, good = values[name].mT if name == "w2" else values[name], values[name].clone()
        for column in (5, 20) if form.get("fp8") else (5,):
            weight.data[3, column] = broken
            refresh(values, first=column == 20)
            values[name].data.copy_(good)
            refresh(values)
            assert_stored(values)


def test_nan_is_like_itself():
    weight = torch.ones(70, 40, dtype=torch.bfloat16, device=DEVICE)
    with_nan = weight.clone().fill_diagonal_(torch.nan)
    assert not changed(with_nan, with_nan.clone(), None)
    assert changed(with_nan, weight, None) and changed(weight, with_nan, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "form",
    [{}, {"group_rows": 48, "ordered": True, "biased": False}, {"gated": True, "activation": "silu"},
     {"gated": True, "group_rows": 64, "ordered": True, "lead": (3, 111)}],
    ids=["plain", "ordered", "gated", "gated, ordered"],
)  # fmt: skip
def test_means_need_no_product(dtype: torch.dtype, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The mean of what the rows of a group give, short ones too, not rounded again; the first neurons are listed."""
    monkeypatch.setattr(mlp, "first_product", None)
    values = replace(CASE, **form).values(dtype, DEVICE)
    common = 2 * torch.randn(CASE.width, generator=torch.Generator().manual_seed(0))  # to all rows, as tokens have it
    values["x"] = values["x"] + common.to(DEVICE, dtype)
    refresh(values, first=True)
    exact = oracle.group_means(oracle.wide(values))
    assert largest_error(values["mean"], exact) <= tolerance(oracle.group_means(values), exact)
    if dtype != torch.float32:
        errors = [(mean - exact).abs().mean() for mean in (values["mean"], exact.to(dtype))]
        assert errors[0] < 0.8 * errors[1]
    listed = torch.arange(CASE.columns, dtype=torch.int32, device=DEVICE)
    assert torch.equal(values["lists"], listed.expand_as(values["lists"]))


def test_a_step_with_every_neuron_keeps_weights_too():
    values = replace(CASE, columns=CASE.neurons).values(torch.bfloat16, DEVICE)
    refresh(values, first=True)
    values["by_neuron"][UNSEEN] = 3.0
    values["clock"][1] = 0
    result = backend.mlp_sparse(**arguments("mlp_sparse", values))
    assert (values["by_neuron"][UNSEEN] == 3).all() and torch.equal(result, refresh(values))
    assert mlp_sparse(**arguments("mlp_sparse", values)).isfinite().all()
