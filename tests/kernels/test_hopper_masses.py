"""Column masses of the CUDA C++ kernel: those of the Triton kernel, code for code, in every size that it takes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels import hopper
from chipmunk_fx.kernels.hopper import tuning
from chipmunk_fx.kernels.triton import masses as plain
from tests.kernels.cards import on_hopper


@dataclass(frozen=True)
class Case:
    """left: rows that `order` leaves out, None where there is no order."""

    heads: int
    key_heads: int
    rows: int
    keys: int
    width: int = 128
    group_rows: int = 192
    stride: int = 4
    left: int | None = 50
    batch: int = 1

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """q, k, order and lse."""
        generator = torch.Generator("cuda").manual_seed(0)

        def heads(count: int, rows: int) -> Tensor:
            x = torch.randn(self.batch, rows, count, self.width, device="cuda", generator=generator)
            return x.to(dtype).transpose(1, 2)

        q, k = heads(self.heads, self.rows), heads(self.key_heads, self.keys)
        all_keys = k.repeat_interleave(self.heads // self.key_heads, 1).float()
        lse = (self.width**-0.5 * q.float() @ all_keys.mT).logsumexp(-1)
        if self.left is None:
            return q, k, None, lse
        order = torch.randperm(self.rows, device="cuda", generator=generator)[: self.rows - self.left]
        return q, k, order.int(), lse

    @property
    def groups(self) -> int:
        return -(-(self.rows - (self.left or 0)) // self.group_rows)


CASES = [
    Case(3, 3, 700, 700),
    Case(4, 2, 1000, 333, batch=2),
    Case(2, 2, 4352, 4353, stride=8, left=None),
    Case(2, 2, 500, 1111, width=64),
    Case(2, 1, 900, 640, width=64, group_rows=128),
    Case(2, 2, 900, 77, group_rows=128, stride=8),
    Case(1, 1, 640, 640, stride=1),
    Case(1, 1, 640, 650, group_rows=128, stride=1, left=None),
    Case(2, 2, 3000, 3000, stride=12),
    Case(2, 2, 1300, 900, group_rows=384),
    Case(1, 1, 640, 640, stride=3),
]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", hopper.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_masses_are_those_of_the_plain_kernel(case: Case, dtype: torch.dtype):
    from chipmunk_fx.kernels.hopper.masses import column_masses

    given, sizes = case.values(dtype), {"scale": case.width**-0.5, "group_rows": case.group_rows, "stride": case.stride}
    heads = case.batch * case.heads
    whole = plain.column_masses(*given, range(heads), range(case.groups), **sizes).int()
    assert whole.unique().numel() > 500
    for some, groups in (
        (range(heads), range(case.groups)),
        (range(heads - 1, heads), range(case.groups // 2, case.groups)),
    ):
        got = column_masses(*given, some, groups, **sizes).int()
        wanted = whole[some.start : some.stop, groups.start : groups.stop]
        assert (got - wanted).abs().max() <= 1  # sums are added up in another order


@pytest.mark.parametrize("group_rows", hopper.GROUP_ROWS)
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8, 12, 16, 64])
@pytest.mark.parametrize("width", hopper.WIDTHS)
def test_samples_fill_an_instruction_or_go_to_the_plain_kernel(group_rows: int, stride: int, width: int):
    sampled = -(-group_rows // stride)
    settings = tuning.mass_settings("bf16", width, sampled)
    if sampled % 8 or sampled < 16 or all(n % sampled for n in (128, 192)):
        assert settings is None
        return
    assert settings is not None and settings.shared <= tuning.SHARED and settings.buffers >= 4
    assert settings.groups * sampled == settings.samples and settings.samples % 64 == 0


@pytest.mark.parametrize(("lines", "keys"), [(1, 1), (48, 4352), (594, 75_600), (33, 119_056), (5000, 640)])
def test_runs_cover_the_keys_in_whole_tiles(lines: int, keys: int):
    run = tuning.mass_run(lines, keys, tuning.UNITS)
    assert run % tuning.KEYS == 0 and 0 < run < keys + tuning.KEYS


def test_runs_fill_the_last_round_of_blocks():
    """48 lines of 68 tiles on 132 multiprocessors: whole lines would leave 84 of them idle."""
    assert 48 * -(-4352 // tuning.mass_run(48, 4352, 132)) >= 132
