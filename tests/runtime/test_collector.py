"""The garbage collector rests while a graph is compiled, and is afterwards as it was before."""

import gc
from collections.abc import Iterator

import pytest

from chipmunk_fx.runtime.collector import resting_collector


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_it_rests_until_the_outermost_ends():
    with resting_collector():
        with resting_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    with pytest.raises(ValueError, match="of a compiler"), resting_collector():
        raise ValueError("of a compiler")
    assert gc.isenabled()


def test_where_the_user_has_switched_it_off_it_stays_off():
    gc.disable()
    with resting_collector():
        pass
    assert not gc.isenabled()
