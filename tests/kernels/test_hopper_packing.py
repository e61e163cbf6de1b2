"""Rows of x as kernels/hopper has them before its products: pack.cu on a Hopper GPU, elsewhere compiled for the CPU. What Triton
does beside it runs in its interpreter where there is no GPU."""

from functools import partial

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.packing import pool
from chipmunk_fx.kernels.hopper.tuning import SPAN, block_rows
from chipmunk_fx.kernels.triton.fp8 import find_largest, store_weight
from chipmunk_fx.ops.fp8 import rounded, scale_for
from chipmunk_fx.ops.mlp import group_means
from tests.kernels import host
from tests.kernels.cards import HOPPER, on_hopper

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = torch.device("cuda" if HOPPER else "cpu")
SCALE = 1 / 448
ERRORS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def packed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the GPU: the kernel compiled for the CPU."""
    if HOPPER:
        return
    if host.COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(nvrtc, "kernel", host.kernel)


needs_kernel = pytest.mark.usefixtures("packed_here")


def unpacked(values: Tensor) -> Tensor:
    """[B G, blocks, steps, rows, SPAN bytes] as [B G, rows of a group, C]: pieces of a line back in their order."""
    lists, blocks, steps, rows, _ = values.shape
    pieces = SPAN // 16
    line = torch.arange(rows, device=values.device) // (8 // pieces) % pieces
    place = torch.arange(pieces, device=values.device) ^ line[:, None]
    swizzled = values.reshape(lists, blocks, steps, rows, pieces, -1)
    ordered = torch.gather(swizzled, 4, place[None, None, None, :, :, None].expand_as(swizzled))
    return ordered.permute(0, 1, 3, 2, 4, 5).reshape(lists, blocks * rows, -1)


def tokens(
    batch: int, rows: int, width: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = HERE
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, rows, width, generator=generator).to(device, dtype)


def in_groups(x: Tensor, group_rows: int, missing: float) -> Tensor:
    """[B, N, ...] as [B G, rows of a group, ...]."""
    pad = x.new_full((x.shape[0], -x.shape[1] % group_rows, *x.shape[2:]), missing)
    return torch.cat([x, pad], 1).unflatten(1, (-1, group_rows)).flatten(0, 1)


def assert_packed(x: Tensor, order: Tensor | None, group_rows: int, fp8: bool):
    """What `pool` makes of x is what plain PyTorch does, and the same bits again."""
    means, packed = pool(x, order, group_rows, fp8)
    again, repeated = pool(x, order, group_rows, fp8)
    in_order = (x if order is None else x[:, order.long()]).float()
    got, values = packed.values, in_order
    if fp8:
        assert packed.scales is not None and repeated.scales is not None
        scales = scale_for(in_order.abs().amax(-1))
        values = rounded(in_order, scales[..., None]).float()
        for some in (packed.scales, repeated.scales):
            torch.testing.assert_close(some, scales, rtol=0, atol=0, equal_nan=True)
        got = unpacked(got.view(torch.uint8)).view(torch.float8_e4m3fn)
    else:
        assert packed.scales is None
        got = unpacked(got)
    there = in_groups(torch.ones_like(in_order[..., 0]), group_rows, 0) > 0
    assert there.any() and packed.values.shape[3] == block_rows(group_rows)
    wanted = in_groups(values, group_rows, 0)[there]
    torch.testing.assert_close(got.float()[there], wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(again, means, rtol=0, atol=0, equal_nan=True)
    for mean, entry in zip(means, in_order, strict=True):
        torch.testing.assert_close(
            mean.float(), group_means(entry, group_rows), rtol=ERRORS[x.dtype], atol=1e-6, equal_nan=True
        )


@needs_kernel
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "group_rows", "ordered"),
    [(500, 128, 384, True), (300, 192, 192, False), (130, 64, 128, True), (111, 576, 192, True)],
)
def test_rows_lie_as_products_want_them(rows: int, width: int, group_rows: int, ordered: bool, fp8: bool):
    x = tokens(2, rows, 2 * width)[..., :width]
    order = torch.randperm(rows, device=HERE).int() if ordered else None
    assert_packed(x, order, group_rows, fp8)


@needs_kernel
def test_rows_of_fp16():
    assert_packed(tokens(1, 200, 320, torch.float16), None, 128, False)


@needs_kernel
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("held", "threads", "cluster"), [(8, 64, 8), (4, 32, 6), (16, 128, 3), (1, 32, 8), (32, 512, 2)]
)
def test_other_settings_make_the_same(
    held: int, threads: int, cluster: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
):
    settings = partial(tuning.pack_settings, held=held, threads=threads, cluster=cluster)
    monkeypatch.setattr(tuning, "pack_settings", settings)
    assert_packed(tokens(1, 300, 832), torch.randperm(300, device=HERE).int(), 192, fp8)


@needs_kernel
def test_rows_that_begin_anywhere():
    x = tokens(2, 130, 200)[..., 3:131]
    assert_packed(x, None, 128, False)


@needs_kernel
def test_rows_in_fp8_are_the_nearest_to_them_over_their_scales():
    x = tokens(2, 300, 128)
    x[0, 7] = 0
    order = torch.randperm(300, device=HERE).int()
    assert_packed(x, order, 192, True)
    assert torch.equal(pool(x, order, 192, True)[0], pool(x, order, 192, False)[0])


@needs_kernel
def test_rows_of_any_size():
    """Each has another largest number: bf16 from the smallest on."""
    bits = torch.arange(1, 0x7B80, 89, dtype=torch.int16, device=HERE)
    largest = bits.view(torch.bfloat16)[:, None]
    x = (tokens(1, len(bits), 512)[0].float().clamp(-1, 1) * largest.float()).to(torch.bfloat16)
    x[:, :1], x[:, 1:2] = largest, -largest / 2
    assert_packed(x[None], None, 192, True)


@needs_kernel
def test_what_is_not_finite_stays_visible():
    x = tokens(1, 192, 64)
    x[0, 3, 5], x[0, 4, 7] = float("nan"), float("inf")
    packed = pool(x, None, 192, True)[1]
    assert packed.scales is not None
    assert packed.scales[0, 3].isnan() and packed.scales[0, 4].isinf() and packed.scales[0, 5].isfinite()
    x[0, 5, :2] = torch.tensor([float("inf"), float("nan")])
    x[0, 6, 0] = torch.finfo(torch.bfloat16).max
    for fp8 in (False, True):
        assert_packed(x, None, 192, fp8)


@pytest.mark.skipif(host.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("first", [1, 35 << 7, 127 << 7, 0x7E80], ids=hex)
def test_a_product_with_the_inverse_is_mended_to_the_quotient(first: int):
    """Many quotients lie in the middle between two numbers of e4m3, or next to it. 35: where small values are lifted."""
    library = host.library(tuning.pack_settings("bf16", 64, 192, True))
    assert library.unequal(first, first + 256) == 0


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("group_rows", [128, 192, 384])
@pytest.mark.parametrize("width", [512, 1536, 3072, 13824])
@pytest.mark.parametrize(("batch", "rows"), [(1, 4352), (3, 4353), (3, 111)])
def test_sizes_of_models(batch: int, rows: int, width: int, group_rows: int):
    order = torch.randperm(rows, device=HERE).int()
    for dtype, fp8 in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
        x = tokens(batch, rows, width + 64, dtype)[..., :width]
        for some in (None, order):
            assert_packed(x, some, group_rows, fp8)


def test_the_largest_magnitude_of_lines_that_lie_apart():
    weight = tokens(1, 70, 600, device=DEVICE)[0][:, :580]
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
    weight = tokens(1, 40, 300, device=DEVICE)[0][:, :272]
    rounded = torch.empty(40, 272, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = (weight.float().abs().max() * SCALE).clone()
    store_weight(weight, rounded, scale)
    assert torch.equal(rounded.float(), (weight.float() / scale).to(torch.float8_e4m3fn).float())
