"""Python's garbage collector rests while a graph is compiled.

Compiling makes many objects that live on, and so sets off collections, each of which walks every object of torch. Where kernels
are in Inductor's cache already, they take a third of a start's time, most of it in Dynamo; a tenth is saved here.
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
