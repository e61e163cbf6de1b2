"""Sizes that may be symbolic: hints for decisions while compiling, values when a call's shapes are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

Size = int | torch.SymInt


def hint(size: Size) -> int:
    """The size seen while compiling; adds no guard. 1 for a size that only the data tell."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def concrete(values: Iterable[Any]) -> list[Any]:
    """Inputs of a graph with what symbols among them are seen to be; adds no guard."""
    return [hint(value) if isinstance(value, torch.SymInt) else value for value in values]


def hints(sizes: Iterable[Size]) -> tuple[int, ...]:
    return tuple(hint(size) for size in sizes)


def is_data_dependent(sizes: Iterable[Size]) -> bool:
    """Whether a size is known only from the data ("unbacked")."""
    return bool(unbacked(sizes))


def unbacked(sizes: Iterable[Size]) -> set[Any]:
    """The symbols in `sizes` that only the data tell."""
    return {symbol for size in sizes for symbol in free_unbacked_symbols(size)}


def symbols_in(sizes: Iterable[Size]) -> tuple[Any, ...]:
    """The symbols that sizes are made of, each once."""
    found = (size.node.expr for size in sizes if isinstance(size, torch.SymInt))
    return tuple(dict.fromkeys(symbol for expr in found for symbol in sorted(expr.free_symbols, key=str)))


def bindings(fakes: Sequence[Any], values: Sequence[Any]) -> dict[Any, int]:
    """What the symbols of the compiled graph stand for in this call; while compiling, what they are seen to be, unguarded."""
    known: dict[Any, int] = {}
    for fake, value in zip(fakes, values, strict=True):
        if isinstance(fake, torch.SymInt):
            known[fake.node.expr] = hint(value)
        elif isinstance(fake, torch.Tensor):
            for size, actual in zip(fake.shape, value.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    known[size.node.expr] = hint(actual)
    return known


def evaluated(size: Size, known: Mapping[Any, int]) -> int | None:
    """The size in one call; None where that hangs on something else (a float of Python's)."""
    told = _told(size, known)
    return None if getattr(told, "free_symbols", None) else int(told)  # a number of Python's where all of it was known


def evaluate(sizes: Iterable[Size], known: Mapping[Any, int]) -> tuple[int, ...]:
    """Concrete sizes for one call."""
    return tuple(int(_told(size, known)) for size in sizes)


def _told(size: Size, known: Mapping[Any, int]) -> Any:
    """A number, or an expression of the symbols that are not known."""
    return size if isinstance(size, int) else size.node.expr.xreplace(dict(known))
