"""Logging: the logger "chipmunk_fx" and one child for each layer, shown by CHIPMUNK_LOGS=graph,plan,runtime. Progress bars.

Importing the package adds no handler unless the variable is set; warnings reach the user through the standard library's
last resort as usual.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

from chipmunk_fx.errors import closest

ROOT = "chipmunk_fx"
AREAS = ("graph", "plan", "runtime")
VARIABLE = "CHIPMUNK_LOGS"

__all__ = ["AREAS", "ROOT", "VARIABLE", "Notices", "configure", "logger", "progress"]

T = TypeVar("T")


def logger(area: str | None = None) -> logging.Logger:
    """The logger of one of AREAS, or of the whole package."""
    if area is not None and area not in AREAS:
        raise ValueError(f"no logger {area!r}; there are {', '.join(AREAS)}")
    return logging.getLogger(ROOT if area is None else f"{ROOT}.{area}")


def configure(value: str | None) -> None:
    """Shows every message of the areas that `value` lists, separated by commas; calling again replaces the choice."""
    chosen = [name.strip() for name in (value or "").split(",") if name.strip()]
    for name in AREAS:
        _switch(logger(name), on=name in chosen)
    for name in dict.fromkeys(chosen):
        if name not in AREAS:
            near = closest(name, AREAS, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            logger().warning("%s: unknown name %r.%s Allowed: %s.", VARIABLE, name, hint, ", ".join(AREAS))


def progress(items: Sequence[T], label: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal where tqdm is installed (it is no dependency of the package)."""
    if find_spec("tqdm") is None:
        return items
    return import_module("tqdm").tqdm(items, desc=label, leave=False, disable=None)


class Notices:
    """What has been said to one owner (a session), so that nothing is said to it twice."""

    def __init__(self) -> None:
        self._said: set[Hashable] = set()

    def once(self, log: logging.Logger, message: str, *, key: Hashable = None, level: int = logging.WARNING) -> bool:
        """Logs `message` unless its `key` (by default the message itself) was used before; true if it was logged."""
        key = message if key is None else key
        if key in self._said:
            return False
        self._said.add(key)
        log.log(level, "%s", message)
        return True


class _Shown(logging.StreamHandler):
    """Prints to stderr unless the application prints already, so that no line appears twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and not logging.getLogger(ROOT).handlers:
            super().emit(record)


def _switch(log: logging.Logger, *, on: bool) -> None:
    shown = [handler for handler in log.handlers if isinstance(handler, _Shown)]
    for handler in shown:
        log.removeHandler(handler)
    if on:
        handler = _Shown()
        handler.setFormatter(logging.Formatter("[%(name)s] %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    elif shown:
        log.setLevel(logging.NOTSET)


if os.environ.get(VARIABLE):
    configure(os.environ[VARIABLE])
