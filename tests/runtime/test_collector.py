"""The garbage collector rests while a graph is compiled, and is afterwards as it was before."""

import gc
import weakref
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


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_made_meanwhile_goes_when_it_ends():
    with resting_collector():
        gone = weakref.ref(Ring())
        assert gone() is not None
    assert gone() is None


def test_no_full_collection_is_due_when_it_ends():
    with resting_collector():
        kept = [Ring() for _ in range(1000)]
    assert gc.get_count()[2] == 0
    assert len(kept) == 1000


def test_what_the_user_has_frozen_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with resting_collector():
            pass
        assert gc.get_freeze_count() > frozen / 2  # what dies leaves it
    finally:
        gc.unfreeze()
