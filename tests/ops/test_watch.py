"""A cache with nan or inf in it is seen wherever they are, and a sound one is left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels import choose, triton
from chipmunk_fx.ops.transfer import cache_watch

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
