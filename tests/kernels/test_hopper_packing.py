"""Rows of x as kernels/hopper has them before its products; in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper.packing import pool
from chipmunk_fx.kernels.hopper.tuning import SPAN
from chipmunk_fx.kernels.triton.fp8 import find_largest, store_weight
from chipmunk_fx.ops.mlp import group_means

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 1 / 448


def unpacked(values: Tensor) -> Tensor:
    """[B G, blocks, steps, rows, SPAN bytes] as [B G, rows of a group, C]: pieces of a line back in their order."""
    lists, blocks, steps, rows, _ = values.shape
    pieces = SPAN // 16
    line = torch.arange(rows, device=values.device) // (8 // pieces) % pieces
    place = torch.arange(pieces, device=values.device) ^ line[:, None]
    swizzled = values.reshape(lists, blocks, steps, rows, pieces, -1)
    ordered = torch.gather(swizzled, 4, place[None, None, None, :, :, None].expand_as(swizzled))
    return ordered.permute(0, 1, 3, 2, 4, 5).reshape(lists, blocks * rows, -1)


def tokens(batch: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, rows, width, generator=generator).to(DEVICE, torch.bfloat16)


def in_groups(x: Tensor, group_rows: int, missing: float) -> Tensor:
    """[B, N, ...] as [B G, rows of a group, ...]."""
    pad = x.new_full((x.shape[0], -x.shape[1] % group_rows, *x.shape[2:]), missing)
    return torch.cat([x, pad], 1).unflatten(1, (-1, group_rows)).flatten(0, 1)


@pytest.mark.parametrize(
    ("rows", "width", "group_rows", "ordered"), [(500, 128, 384, True), (300, 192, 192, False), (130, 64, 128, True)]
)
def test_rows_lie_as_products_want_them(rows: int, width: int, group_rows: int, ordered: bool):
    x = tokens(2, rows, 2 * width)[..., :width]
    order = torch.randperm(rows, device=DEVICE).int() if ordered else None
    means, packed = pool(x, order, group_rows, False)
    in_order = x if order is None else x[:, order.long()]
    expected = in_groups(in_order.float(), group_rows, float("nan"))
    there = expected.isfinite()
    assert there.any() and packed.scales is None
    assert torch.equal(unpacked(packed.values).float()[there], expected[there])
    for mean, entry in zip(means, in_order, strict=True):
        torch.testing.assert_close(mean.float(), group_means(entry, group_rows), rtol=2**-8, atol=1e-6)


def test_rows_in_fp8_are_the_nearest_to_them_over_their_scales():
    x = tokens(2, 300, 128)
    x[0, 7] = 0
    order = torch.randperm(300, device=DEVICE).int()
    means, packed = pool(x, order, 192, True)
    assert torch.equal(means, pool(x, order, 192, False)[0]) and packed.scales is not None
    in_order = x[:, order.long()].float()
    scales = in_order.abs().amax(-1) * SCALE
    scales[scales == 0] = 1
    assert torch.equal(packed.scales, scales)
    got = unpacked(packed.values.view(torch.uint8)).view(torch.float8_e4m3fn).float()
    wanted = in_groups(in_order / scales[..., None], 192, float("nan"))
    there = wanted.isfinite()
    assert torch.equal(got[there], wanted[there].to(torch.float8_e4m3fn).float())


def test_what_is_not_finite_stays_visible():
    x = tokens(1, 192, 64)
    x[0, 3, 5], x[0, 4, 7] = float("nan"), float("inf")
    packed = pool(x, None, 192, True)[1]
    assert packed.scales is not None
    assert packed.scales[0, 3].isnan() and packed.scales[0, 4].isinf() and packed.scales[0, 5].isfinite()


def test_the_largest_magnitude_of_lines_that_lie_apart():
    weight = tokens(1, 70, 600)[0][:, :580]
    most = torch.full((), 0.5, device=DEVICE)
    find_largest(weight, most)
    assert most.item() == weight.float().abs().max().item() > 0.5
    most.fill_(100.0)
    find_largest(weight, most)
    assert most.item() == 100.0
    weight[69, 579] = float("nan")
    find_largest(weight, most)
    assert most.isnan()


def test_a_weight_is_rounded_with_one_scale():
    weight = tokens(1, 40, 300)[0][:, :272]
    rounded = torch.empty(40, 272, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = (weight.float().abs().max() * SCALE).clone()
    store_weight(weight, rounded, scale)
    assert torch.equal(rounded.float(), (weight.float() / scale).to(torch.float8_e4m3fn).float())
