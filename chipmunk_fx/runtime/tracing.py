"""The garbage collector rests while Dynamo traces for our backend, too, which is asked only when that is done.

Dynamo tells whoever registers that a compile begins or ends, but not for which backend: that is read in the call it is made
by. Where this fails, collections go on until the backend is asked.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch._dynamo

from chipmunk_fx.runtime.collector import resting_collector
from chipmunk_fx.runtime.registry import is_ours


class TracingRest:
    """Dynamo calls `begin` and `end` in pairs, never in two threads at once; compiles inside one have no calls of their own."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def begin(self, *_: Any) -> None:
        if is_ours(_asked()):
            self._open.enter_context(resting_collector())

    def end(self, *_: Any) -> None:
        self._open.close()


def rest_while_tracing() -> None:
    """From now on; `torch._dynamo.reset()` ends it."""
    handler = getattr(torch._dynamo, "callback_handler", None)
    if handler is not None:
        rest = TracingRest()
        handler.register_end_callback(rest.end)
        handler.register_start_callback(rest.begin)


def is_resumed() -> bool:
    """Whether the backend is asked for what comes behind a graph break."""
    return getattr(_known("code"), "co_name", "").startswith("torch_dynamo_resume_in")


def _asked() -> Any:
    """The backend of the compile that is about to begin, in Dynamo's wrappers, or None."""
    return _known("compiler_fn")


def _known(name: str) -> Any:
    """What Dynamo's innermost compile under way has by that name."""
    frame = sys._getframe()
    while frame is not None and not (frame.f_code.co_name == "_compile" and name in frame.f_locals):
        frame = frame.f_back
    return frame and frame.f_locals.get(name)
