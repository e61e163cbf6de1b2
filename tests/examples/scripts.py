"""Runs a script of examples/ in this process, with its neighbours importable only meanwhile."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
NEIGHBOURS = ("common", "video")


@contextmanager
def script(name: str, function: str) -> Iterator[Callable[..., Any]]:
    """`function` of examples/`name`.py, taking the words of a command line."""
    names = (name, *NEIGHBOURS)
    for one in names:
        sys.modules.pop(one, None)
    sys.path.insert(0, str(EXAMPLES))
    try:
        called = getattr(import_module(name), function)
        yield lambda *words: called([str(word) for word in words])
    finally:
        sys.path.remove(str(EXAMPLES))
        for one in names:
            sys.modules.pop(one, None)
