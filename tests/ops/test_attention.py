"""Laws of the attention operators: standing still, full density, locality, the formula, memory, randomness."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chipmunk_fx.ops.dense as dense
import chipmunk_fx.ops.groups as groups
from chipmunk_fx.ops.attention import attention_refresh, attention_sparse
from chipmunk_fx.ops.cases import AttentionCase, arguments, largest_error, tolerance
from tests.ops import oracle

CASE = AttentionCase(rows=320, keys=320, width=64, group_rows=16, columns=48)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def refresh(values: dict[str, Any]) -> Tensor:
    return attention_refresh(**arguments("attention_refresh", values))


def sparse(values: dict[str, Any]) -> Tensor:
    return attention_sparse(**arguments("attention_sparse", values))


def assert_dense(out: Tensor, values: dict[str, Any]) -> None:
    """As near to dense attention in fp64 as plain PyTorch in the same dtype, within a factor of two."""
    exact, _ = oracle.attention(oracle.wide(values))
    assert largest_error(out, exact) <= tolerance(oracle.attention(values)[0], exact)


@DTYPES
@pytest.mark.parametrize("columns", [1, 48, 200, 320])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_standing_still_gives_the_dense_result(dtype: torch.dtype, columns: int, power: float):
    values = replace(CASE, columns=columns, power=power).values(dtype)
    refresh(values)
    assert_dense(sparse(values), values)


@pytest.mark.parametrize("columns", [1, 48, 200])
def test_standing_still_additive(columns: int):
    """The selected part alone is larger than the result: its rounding is allowed on top in low precision."""
    values = replace(CASE, columns=columns, power=0.0).values(torch.bfloat16)
    out = refresh(values)
    part = (out.float() - values["rest"].float()).abs().max().item()
    assert (sparse(values).float() - out.float()).abs().max().item() <= 2**-8 * (part + out.abs().max().item())


@DTYPES
@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("grouped", [None, 320], ids=["raster", "permuted"])
def test_with_every_column_each_step_is_dense(dtype: torch.dtype, power: float, grouped: int | None):
    case = replace(CASE, columns=CASE.keys, power=power, grouped=grouped)
    values = case.values(dtype)
    refresh(values)
    for step in range(1, 4):
        values |= case.projections(dtype, seed=step)
        exact, _ = oracle.attention(oracle.wide(values))
        # what the refresh left is the difference of two roundings of its own result
        allowed = tolerance(oracle.attention(values)[0], exact) + values["rest"].abs().max().item()
        assert largest_error(sparse(values), exact) <= allowed


@DTYPES
def test_rows_that_the_order_omits_are_dense(dtype: torch.dtype):
    case = replace(CASE, grouped=290, fixed=9)
    values = case.values(dtype)
    refresh(values)
    values |= case.projections(dtype, seed=1)
    out = sparse(values)
    omitted = torch.ones(case.rows, dtype=torch.bool).index_fill(0, values["order"].long(), False)
    exact = oracle.attention(oracle.wide(values))[0][:, :, omitted]
    assert omitted.sum() == 30
    assert largest_error(out[:, :, omitted], exact) <= tolerance(oracle.attention(values)[0][:, :, omitted], exact)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_sparse_step_is_the_formula(power: float):
    """o + w0^p (o_sel' - o_sel) from the two inputs and the lists alone, in fp64."""
    case = replace(CASE, power=power, grouped=CASE.rows)
    values = case.values(torch.float32)
    before = oracle.wide(values)
    refresh(values)
    rest, share = oracle.remainder(before, values["lists"])
    values |= case.projections(torch.float32, seed=1)
    exact = oracle.sparse_attention(oracle.wide(values) | {"rest": rest, "share": share})
    dense_now = oracle.attention(oracle.wide(values))[0]
    assert largest_error(sparse(values), exact) <= 1e-5
    assert largest_error(exact, dense_now) > 1e-2  # the columns left out matter


def test_nothing_is_read_back_from_the_device():
    """What has no value yet cannot be read: here, as while a CUDA graph is recorded. The last group is short."""
    case = replace(CASE, rows=330, grouped=325, fixed=5, mass_stride=8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in case.values(torch.float32).items()}
        for step in (refresh, sparse):
            assert step(values).shape == (1, 2, 330, 64)


def test_any_strides_and_no_change_of_the_inputs():
    """A head width that is not innermost is what PyTorch's CPU kernel reads wrongly."""
    values = CASE.values(torch.float32)
    strided = CASE.values(torch.float32)
    for name in ("q", "k", "v"):
        strided[name] = strided[name].mT.contiguous().mT
    for name in ("rest", "share"):
        strided[name] = strided[name].transpose(1, 2).contiguous().transpose(1, 2)
    kept = {name: strided[name].clone() for name in ("q", "k", "v")}
    out, other = refresh(values), refresh(strided)
    torch.testing.assert_close(other, out)
    assert torch.equal(strided["lists"], values["lists"])
    torch.testing.assert_close(sparse(strided), sparse(values))
    assert all(torch.equal(strided[name], before) for name, before in kept.items())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_score_matrix_is_held(monkeypatch: pytest.MonkeyPatch):
    """What is held at once follows a limit in bytes, not the number of rows times columns."""
    monkeypatch.setattr(groups, "_GATHER_BYTES", {"cpu": 1 << 18})
    values = AttentionCase(rows=2048, keys=2048, width=32, group_rows=128, columns=256, heads=3).values(torch.float32)
    with Largest() as largest:
        refresh(values)
        sparse(values)
    assert largest.elements < 2048 * 2048 // 4


def test_random_columns_follow_the_clock_and_leave_the_generator_alone():
    values = replace(CASE, random_density=0.1).values(torch.float32)
    state = torch.get_rng_state()
    lists = []
    for step, seed, site in [(0, 1, 2), (0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]:
        values |= {"seed": seed, "site": site, "clock": torch.tensor([step, 1])}
        refresh(values)
        lists.append(values["lists"].clone())
    assert torch.equal(lists[0], lists[1])
    assert all(not torch.equal(lists[0], other) for other in lists[2:])
    assert torch.equal(state, torch.get_rng_state())


@DTYPES
def test_attention_in_plain_operators(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The last resort on an accelerator, a few rows at a time."""
    monkeypatch.setattr(dense, "_SCORE_BYTES", 4 * 2 * 111 * 10)
    values = AttentionCase(rows=63, keys=111, width=40, group_rows=16, columns=20).values(dtype)
    out, lse = dense.rows_at_a_time(values["q"], values["k"], values["v"], None, values["scale"])
    exact, exact_lse = oracle.attention(oracle.wide(values))
    plain, plain_lse = oracle.attention(values)
    assert largest_error(out, exact) <= tolerance(plain, exact)
    assert largest_error(lse, exact_lse) <= tolerance(plain_lse, exact_lse)
