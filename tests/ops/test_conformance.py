"""Every implementation of every operator against its formula in fp64, on the cases that the operators bring."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels import BACKENDS
from chipmunk_fx.ops.cases import (
    ATTENTION_CASES,
    EARLIER_CASES,
    LONG_ATTENTION_CASES,
    LONG_MLP_CASES,
    MLP_CASES,
    AttentionCase,
    MlpCase,
    arguments,
    largest_error,
    tolerance,
)
from chipmunk_fx.ops.library import REFERENCE
from chipmunk_fx.ops.selection import random_count, spare_places
from tests.ops import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", *(backend.name for backend in BACKENDS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEPT = 1e-3  # share of the threshold within which fp32 may rank two scores either way


def long_on_cpu(*values: Any, long: bool = True) -> Any:
    """Parameters that take long in an interpreter of kernels."""
    return pytest.param(*values, marks=[pytest.mark.full] if long and DEVICE == "cpu" else [])


implementations_and_dtypes = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [long_on_cpu(i, d, long=i != "reference" and d != torch.float32) for i in IMPLEMENTATIONS for d in DTYPES],
    ids=str,
)
attention_cases = pytest.mark.parametrize("case", [*ATTENTION_CASES, *map(long_on_cpu, LONG_ATTENTION_CASES)], ids=repr)
refresh_cases = pytest.mark.parametrize(
    "case", [*ATTENTION_CASES, *EARLIER_CASES, *map(long_on_cpu, LONG_ATTENTION_CASES)], ids=repr
)
mlp_cases = pytest.mark.parametrize("case", [*MLP_CASES, *map(long_on_cpu, LONG_MLP_CASES)], ids=repr)


def run(implementation: str, op: str, values: dict[str, Any]) -> Tensor:
    if implementation == "reference":
        function = REFERENCE[op]
    else:
        (backend,) = (b for b in BACKENDS if b.name == implementation)
        function = getattr(backend, op, None)
        reason = f"does not implement {op}" if function is None else backend.supports(op, values)
        if function is None or reason is not None:
            pytest.skip(f"{implementation}: {reason}")
    with torch.no_grad():
        return function(**arguments(op, values))


def within(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of `got` is at most twice that of `plain`, which is the same formula in the same dtype."""
    assert largest_error(got, exact) <= tolerance(plain, exact)


def worst(plain: Sequence[Tensor], exact: Tensor) -> Tensor:
    """The one that is farthest from `exact`."""
    return max(plain, key=lambda one: largest_error(one.nan_to_num(), exact.nan_to_num()))


def assert_selected(
    lists: Tensor,
    scores: Tensor,
    plain: Tensor,
    drawn: int,
    always: Tensor | None,
    valid: Tensor | None,
    spare: Tensor | None = None,
) -> None:
    """Ascending, none twice, the largest scores (as far as the dtype tells them apart) and the always-on ones."""
    total, columns = scores.shape[-1], lists.shape[-1]
    assert lists.dtype == torch.int32
    if spare is not None:  # each group has its own number of columns to choose from
        for b, g in product(range(lists.shape[0]), range(lists.shape[2])):
            places = columns - int(spare[b % len(spare), g])
            own, fixed = lists[b : b + 1, :, g : g + 1], None if always is None else always[g : g + 1]
            assert (own[..., places:] == total).all()
            part = (x[b : b + 1, :, g : g + 1] for x in (scores, plain))
            keys = None if valid is None else valid[b : b + 1]
            assert_selected(own[..., :places], *part, drawn, fixed, keys)
        return
    if valid is not None:  # each batch entry has its own number of columns to choose from
        for b, keys in enumerate(valid):
            own, count = lists[b], int(keys.sum())
            present = own[..., : min(columns, count)]
            assert (own[..., present.shape[-1] :] == total).all() and keys[present.long()].all()
            packed = torch.cumsum(keys, 0, dtype=torch.int32) - 1  # place of each column among the valid ones
            fixed = None if always is None else always[:, keys]
            assert_selected(packed[present.long()], scores[b][..., keys], plain[b][..., keys], drawn, fixed, None)
        return
    assert (lists.diff() > 0).all() and (lists >= 0).all() and (lists < total).all()
    if columns == total:
        return
    slack = KEPT + 2 * ((plain - scores).abs() / scores.abs().clamp(min=1e-30)).max().item()
    if always is not None:
        scores = scores.masked_fill(always, float("inf"))
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=lists.device).scatter_(-1, lists.long(), True)
    if always is not None:
        assert (chosen | ~always).all()
    best = columns - drawn
    threshold = scores.topk(best, -1).values[..., -1:]
    assert (chosen | (scores <= threshold * (1 + slack))).all(), "a column of larger score was left out"
    assert ((chosen & (scores >= threshold * (1 - slack))).sum(-1) >= best).all()


@implementations_and_dtypes
@refresh_cases
def test_attention_refresh(implementation: str, dtype: torch.dtype, case: AttentionCase):
    values = case.values(dtype, DEVICE)
    exact, before = oracle.wide(values), None if values["lse"] is None else values["lse"].clone()
    out = run(implementation, "attention_refresh", values)
    (plain_out, plain_lse), (exact_out, exact_lse) = oracle.attention(values), oracle.attention(exact)
    within(out, plain_out, exact_out)
    if before is not None:
        assert_denominators(case, values, plain_lse, exact_lse)
    drawn = random_count(case.keys, case.random_density, case.columns)
    masses = oracle.masses(exact), oracle.masses(values | {"lse": before})
    spare = spare_places(values["always"], values["valid"], case.columns) if case.near is not None else None
    assert spare is None or (spare.max() > 0) == (case.columns < max(case.present or (case.keys,)))
    assert_selected(values["lists"], *masses, drawn, values["always"], values["valid"], spare)
    assert_remainder(case, values, exact, (plain_out, plain_lse), (exact_out, exact_lse))


def assert_denominators(case: AttentionCase, values: dict[str, Any], plain: Tensor, exact: Tensor) -> None:
    """Those of rows in groups are left for the next refresh."""
    rows = torch.cat(oracle.groups(values, case.rows)).to(plain.device)
    within(*(lse[..., rows].nan_to_num(neginf=0) for lse in (values["lse"], plain, exact)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_columns_of_a_group_that_are_cut_to_a_span(implementation: str):
    """Their lines lie apart."""
    case = AttentionCase(rows=111, keys=96, width=64, group_rows=32, columns=64, near=40)
    whole, cut = case.values(torch.float32, DEVICE), case.values(torch.float32, DEVICE)
    cut["always"] = torch.nn.functional.pad(cut["always"], (16, 16))[:, 16:-16]
    for values in (whole, cut):
        run(implementation, "attention_refresh", values)
    assert torch.equal(cut["lists"], whole["lists"])


def assert_remainder(
    case: AttentionCase,
    values: dict[str, Any],
    exact: dict[str, Any],
    plain: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
) -> None:
    """rest and share are what the result leaves beside the lists; `plain`, `truth`: attention in the dtype and in fp64."""
    (plain_out, plain_lse), (exact_out, exact_lse) = plain, truth
    present = exact_lse.isfinite()
    plain_rest, plain_share = oracle.remainder(values, values["lists"])
    rest, share = oracle.remainder(exact, values["lists"])
    # differences of two results, each as exact as the dense one
    allowed = tolerance(plain_share, share) + case.power * largest_error(plain_lse[present], exact_lse[present])
    assert largest_error(values["share"], share) <= allowed
    allowed = tolerance(plain_rest, rest) + tolerance(plain_out, exact_out)
    assert largest_error(values["rest"], rest) <= allowed


@implementations_and_dtypes
@pytest.mark.parametrize("case", [ATTENTION_CASES[i] for i in (0, 3, 6, 11)], ids=repr)
def test_attention_refresh_that_keeps_its_lists(implementation: str, dtype: torch.dtype, case: AttentionCase):
    values = case.values(dtype, DEVICE)
    run("reference", "attention_refresh", values)
    before = values["lists"].clone()
    values |= case.projections(dtype, DEVICE, seed=1) | {"renew": False}
    for name in ("rest", "share"):
        values[name].fill_(torch.nan)
    exact = oracle.wide(values)
    out = run(implementation, "attention_refresh", values)
    assert torch.equal(values["lists"], before)
    (plain_out, plain_lse), (exact_out, exact_lse) = oracle.attention(values), oracle.attention(exact)
    within(out, plain_out, exact_out)
    assert_remainder(case, values, exact, (plain_out, plain_lse), (exact_out, exact_lse))


@implementations_and_dtypes
@attention_cases
def test_attention_sparse(implementation: str, dtype: torch.dtype, case: AttentionCase):
    values = case.values(dtype, DEVICE)
    run("reference", "attention_refresh", values)
    values |= case.projections(dtype, DEVICE, seed=1)
    kept = {name: values[name].clone() for name in ("rest", "share", "lists")}
    out = run(implementation, "attention_sparse", values)
    within(out, oracle.sparse_attention(values), oracle.sparse_attention(oracle.wide(values)))
    assert all(torch.equal(values[name], before) for name, before in kept.items())
    assert out.transpose(1, 2).is_contiguous()


@implementations_and_dtypes
@mlp_cases
def test_mlp_refresh(implementation: str, dtype: torch.dtype, case: MlpCase):
    values = case.values(dtype, DEVICE)
    exact = oracle.wide(values)
    result = run(implementation, "mlp_refresh", values)
    plain, truth = oracle.mlp(values), oracle.mlp(exact)
    within(values["out"], plain, truth)
    within(result.view_as(truth), plain, truth)
    within(values["mean"], oracle.group_means(values), oracle.group_means(exact))
    assert_hidden(values, exact)
    if case.fp8:
        assert_weights_in_fp8(values)


def assert_weights_in_fp8(values: dict[str, Any]) -> None:
    """Weights over 448th parts of the largest, rounded to the nearest of e4m3: half of 2^-3 of them, or of 2^-9."""
    names = ("w1", "w2") if values["wu"] is None else ("w1", "wu", "w2")
    for name, kept, scale in zip(names, (*values["w1_fp8"], values["by_neuron"].mT), values["scales"], strict=True):
        weight, scale = values[name].double(), scale.double()
        assert scale.item() == pytest.approx(weight.abs().max().item() / 448, rel=1e-6)
        error = (kept.double() * scale - weight).abs()
        assert (error <= (weight.abs() / 16).clamp(min=scale / 1024) * (1 + 1e-5)).all()
    largest = values["hidden"].nan_to_num(0).abs().max().item()  # what no row belongs to is poisoned
    assert values["change_scale"].item() == pytest.approx(2 * largest / 448, rel=1e-6)


def assert_hidden(values: dict[str, Any], exact: dict[str, Any]) -> None:
    """hidden[b, g, f, r] is neuron f of row r of group g."""
    x, truth = oracle.batches(values["x"]), oracle.batches(exact["x"])
    for b in range(x.shape[0]):
        plain, best = oracle.hidden(values, x[b]), oracle.hidden(exact, truth[b])
        for g, rows in enumerate(oracle.groups(values, x.shape[1])):
            within(values["hidden"][b, g, :, : len(rows)].mT, plain[rows], best[rows])


@implementations_and_dtypes
@mlp_cases
@pytest.mark.parametrize("renew", [True, False], ids=["new lists", "kept lists"])
def test_mlp_sparse(implementation: str, dtype: torch.dtype, case: MlpCase, renew: bool):
    values = case.values(dtype, DEVICE)
    run("reference", "mlp_refresh", values)
    values["x"] = case.tokens(dtype, DEVICE, seed=1)
    values["clock"][1] = int(renew)
    before = {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}
    result = run(implementation, "mlp_sparse", values)

    mean, plain_mean = oracle.group_means(oracle.wide(before)), oracle.group_means(before)
    if renew:
        change, plain = (mean - before["mean"].double()).abs(), (plain_mean.double() - before["mean"].double()).abs()
        drawn = random_count(case.neurons, case.random_density, case.columns)
        assert_changed_most(values["lists"], change, plain, drawn)
    else:
        assert torch.equal(values["lists"], before["lists"])
    chosen = values["lists"].long()
    if renew or case.columns == case.neurons:  # with all neurons listed a sparse step is a refresh
        within(values["mean"], before["mean"].scatter(2, chosen, plain_mean.gather(2, chosen).float()),
               before["mean"].double().scatter(2, chosen, mean.gather(2, chosen)))  # fmt: skip
    else:
        assert torch.equal(values["mean"], before["mean"])

    exact_out, exact_hidden = oracle.sparse_mlp(oracle.wide(before), values["lists"])
    # Ways to add up: where results are rounded both come to the same.
    ways = [False, True] if dtype == torch.float32 else [False]
    outs, hiddens = zip(*(oracle.sparse_mlp(before, values["lists"], batched) for batched in ways), strict=True)
    plain_out, plain_hidden = worst(outs, exact_out), worst(hiddens, exact_hidden)
    assert torch.equal(values["hidden"].isnan(), exact_hidden.isnan())
    changed = [hidden.nan_to_num() for hidden in (values["hidden"], plain_hidden, exact_hidden)]
    within(*changed)
    if case.fp8 and dtype == torch.float32:  # in narrower dtypes many round otherwise in plain PyTorch, too
        off = oracle.undecided(before, values["lists"], exact_hidden, tolerance(*changed[1:]))
        exact_out = exact_out + (values["out"] - exact_out).clamp(-off, off)
    within(values["out"], plain_out, exact_out)
    within(result.view_as(exact_out), plain_out.to(dtype), exact_out)


def assert_changed_most(lists: Tensor, change: Tensor, plain: Tensor, drawn: int) -> None:
    """As `assert_selected`, with the slack in absolute terms: a change may be zero."""
    total, columns = change.shape[-1], lists.shape[-1]
    assert (lists.diff() > 0).all() and (lists >= 0).all() and (lists < total).all()
    if columns == total:
        return
    slack = 2 * largest_error(plain, change) + 1e-6
    chosen = torch.zeros(change.shape, dtype=torch.bool, device=lists.device).scatter_(-1, lists.long(), True)
    threshold = change.topk(columns - drawn, -1).values[..., -1:]
    assert (chosen | (change <= threshold + slack)).all(), "a neuron that changed more was left out"
    assert ((chosen & (change >= threshold - slack)).sum(-1) >= columns - drawn).all()
