"""Python's garbage collector rests while a graph is traced and compiled.

Compiling makes many objects that live on, and so sets off collections, each of which walks every object of torch: a fifth of
the time that it takes to trace 57 blocks, a tenth of a start whose kernels are in Inductor's cache.
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
        try:
            _settle()
        finally:
            gc.enable()


def _settle() -> None:
    """Of what is new, garbage goes and the rest is old: a full collection, due by now, would find little else."""
    gc.collect(1)
    if not gc.get_freeze_count():  # what the user has frozen would thaw
        gc.freeze()
        gc.unfreeze()
