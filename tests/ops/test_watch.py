"""A cache with nan or inf in it is seen wherever they are, and a sound one is left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels import choose, hopper, triton
from chipmunk_fx.kernels.hopper.watching import suits
from chipmunk_fx.ops.transfer import cache_watch
from tests.kernels.cards import on_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ways = pytest.mark.parametrize("watch", [cache_watch, triton.cache_watch], ids=["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@ways
@dtypes
@pytest.mark.parametrize("place", [0, 8191, 8192, 20_004])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_damage_is_seen(watch: Callable[..., None], dtype: torch.dtype, place: int, value: float):
    cache, broken = sound(dtype), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    cache.view(-1)[place] = value
    watch(cache=cache, broken=broken, columns=5000)
    assert broken.item()


@ways
@dtypes
def test_a_sound_cache_changes_nothing(watch: Callable[..., None], dtype: torch.dtype):
    cache = sound(dtype)
    cache.view(-1)[7] = torch.finfo(dtype).max
    for before in (False, True):  # what was broken stays so
        broken = torch.full((1,), before, device=DEVICE)
        watch(cache=cache, broken=broken, columns=5000)
        assert broken.item() == before


@ways
@dtypes
def test_the_first_columns_of_every_row_are_watched(watch: Callable[..., None], dtype: torch.dtype):
    for row, column in ((0, 63), (4, 0), (2, 64)):
        cache, broken = sound(dtype), torch.zeros(1, dtype=torch.bool, device=DEVICE)
        cache[row, column] = float("nan")
        watch(cache=cache, broken=broken, columns=64)
        assert broken.item() == (column < 64)


def sound(dtype: torch.dtype) -> Tensor:
    """20,005 values."""
    return torch.linspace(-1, 1, 20_005, dtype=dtype, device=DEVICE).view(5, -1)


def test_the_kernel_is_chosen_by_dtype():
    cache, broken = torch.zeros(3, device=DEVICE), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    assert choose("cache_watch", {"cache": cache.double(), "broken": broken, "columns": 64})[1] == "reference"
    assert choose("cache_watch", {"cache": cache, "broken": broken, "columns": 64}, [triton])[1] == "triton"


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("columns", [64, 512, 9999])
def test_sums_of_mlps_are_watched_on_hopper(columns: int):
    for row, column in ((0, 0), (2, 63), (699, 64), (699, 511)):
        cache, broken = torch.ones(1, 700, 512, device=DEVICE), torch.zeros(1, dtype=torch.bool, device=DEVICE)
        for value, seen in ((3e38, False), (float("-inf"), column < columns), (float("nan"), column < columns)):
            cache[0, row, column] = value
            assert choose("cache_watch", {"cache": cache, "broken": broken, "columns": columns})[1] == "hopper"
            hopper.cache_watch(cache=cache, broken=broken, columns=columns)
            assert broken.item() is seen


def test_rows_that_threads_cannot_read_are_left_to_others():
    assert suits(torch.zeros(3, 8), 4) and suits(torch.zeros(3, 8), 100)
    assert not suits(torch.zeros(3, 8), 6) and not suits(torch.zeros(3, 6), 4)
    assert not suits(torch.zeros(17)[1:].view(2, 8), 4)
    cache, broken = torch.zeros(3, 8), torch.zeros(1, dtype=torch.bool)
    assert (
        hopper.supports("cache_watch", {"cache": cache, "broken": broken, "columns": 4})
        == "device cpu, allowed is cuda"
    )
