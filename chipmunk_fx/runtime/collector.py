"""Python's garbage collector rests while a graph is compiled.

Compiling makes many objects that live on, and so sets off collections, each of which walks every object of torch: a third of
the time of a start whose kernels are in Inductor's cache already.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Iterator[None]:
    """No collections by themselves in here, in any thread. Whoever switched them off turns them on again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
