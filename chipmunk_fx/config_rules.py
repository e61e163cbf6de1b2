"""What a setting may be: one rule a kind of value, with the sentence that an error shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

from chipmunk_fx.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """`parse` returns the value as it is kept or raises ValueError; `allowed` completes "Allowed: ..."."""

    allowed: str
    parse: Callable[[Any], Any]
    names: tuple[str, ...] = ()  # where only these are allowed
    plain: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value  # for YAML

    def check(self, key: str, value: Any, source: str | None = None) -> Any:
        """The parsed value; ConfigError naming `key` and where it was given, if it is not allowed."""
        try:
            return self.parse(value)
        except ValueError:
            if self.names:
                raise ConfigError.unlisted(key, value, self.names, source=source) from None
            raise ConfigError.invalid(key, value, self.allowed, source=source, hint=_hint(value)) from None


def option(default: T, rule: Rule) -> T:
    """A dataclass field with its default and the rule for other values."""
    return field(default=default, metadata={"rule": rule})


class Section:
    """Base of the config dataclasses: every field is checked, however the object is made."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():
            object.__setattr__(self, name, rule.check(self.prefix + name, getattr(self, name)))


def rules(section: type) -> dict[str, Rule]:
    """The rules of a section by field name; fields without one are sections themselves."""
    return {item.name: item.metadata["rule"] for item in fields(section) if "rule" in item.metadata}


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _integer(value: Any) -> int:
    _require(isinstance(value, Integral) and not isinstance(value, bool))
    return int(value)


def _real(value: Any) -> float:
    _require(isinstance(value, Real) and not isinstance(value, bool))
    _require(math.isfinite(value))
    return float(value)


def _flag(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


FLAG = Rule("true or false", _flag)


def integer(low: int, high: int | None = None) -> Rule:
    def parse(value: Any) -> int:
        number = _integer(value)
        _require(number >= low and (high is None or number <= high))
        return number

    return Rule(f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}", parse)


def share(*, zero: bool) -> Rule:
    """A number from 0 to 1, with or without 0 itself."""

    def parse(value: Any) -> float:
        number = _real(value)
        _require(0 <= number <= 1 and (zero or number != 0))
        return number

    return Rule("a number from 0 to 1" if zero else "a number above 0 and at most 1", parse)


def amount() -> Rule:
    def parse(value: Any) -> float:
        number = _real(value)
        _require(number >= 0)
        return number

    return Rule("a number of at least 0", parse)


def multiple(of: int) -> Rule:
    def parse(value: Any) -> int:
        number = _integer(value)
        _require(number > 0 and number % of == 0)
        return number

    return Rule(f"a positive multiple of {of}", parse)


def choice(*names: str, aliases: Sequence[tuple[Any, str]] = ()) -> Rule:
    """One of `names`. `aliases` are pairs of another spelling and the name it stands for."""

    def parse(value: Any) -> str:
        for spelling, name in aliases:
            if value is spelling:
                return name
        _require(isinstance(value, str) and value in names)
        return value

    return Rule(" or ".join(repr(name) for name in names), parse, names)


def word_or(word: str, rule: Rule) -> Rule:
    def parse(value: Any) -> Any:
        return value if isinstance(value, str) and value == word else rule.parse(value)

    return Rule(f"{word!r} or {rule.allowed}", parse)


def absent_or(word: str, rule: Rule) -> Rule:
    """None, also written as `word`, or what `rule` takes."""

    def parse(value: Any) -> Any:
        return None if value is None or (isinstance(value, str) and value == word) else rule.parse(value)

    return Rule(f"null ({word}) or {rule.allowed}", parse)


def _steps(value: Any) -> tuple[int, ...]:
    if isinstance(value, set | frozenset):  # YAML's !!set has no order of its own
        value = sorted(_integer(item) for item in value)
    _require(isinstance(value, Sequence) and not isinstance(value, str | bytes))
    steps = tuple(_integer(item) for item in value)
    _require(all(step >= 0 for step in steps))
    _require(all(a < b for a, b in zip(steps, steps[1:], strict=False)))
    return steps


STEPS = Rule("a list of step indices from 0 on, each larger than the one before", _steps)


def _grid(value: Any) -> tuple[int, int, int]:
    _require(isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 3)
    t, h, w = (_integer(item) for item in value)
    _require(min(t, h, w) > 0)
    return t, h, w


def layers() -> Rule:
    """What single blocks do: a mapping such as {3: "dense", "10-20": 0.1}, kept as (first, last, value) in order."""
    density = word_or("dense", share(zero=False))

    def parse(value: Any) -> tuple[tuple[int, int, Any], ...]:
        if value is None or value == "none":
            return ()
        if isinstance(value, Mapping):
            ranges = [(*_blocks(key), density.parse(chosen)) for key, chosen in value.items()]
        else:
            _require(isinstance(value, list | tuple) and all(isinstance(one, list | tuple) for one in value))
            ranges = [(_integer(first), _integer(last), density.parse(chosen)) for first, last, chosen in value]
        ranges.sort(key=lambda one: one[:2])
        _require(all(0 <= first <= last for first, last, _ in ranges))
        _require(all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False)))
        return tuple(ranges)

    def plain(value: tuple[tuple[int, int, Any], ...]) -> dict[str, Any]:
        return {str(first) if first == last else f"{first}-{last}": chosen for first, last, chosen in value}

    allowed = (
        'null (none) or a mapping from blocks, each of them once, as "3" or "10-20" (they count from 0), to "dense" or a '
        "density above 0 and at most 1"
    )
    return Rule(allowed, parse, plain=plain)


def _blocks(key: Any) -> tuple[int, int]:
    if isinstance(key, str):
        first, _, last = key.partition("-")
        return int(first), int(last or first)
    return _integer(key), _integer(key)


GRID = Rule("three positive integers (frames, rows, columns of tokens)", _grid)


def _text(value: Any) -> tuple[str, int]:
    _require(isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2)
    place, count = str(value[0]), _integer(value[1])
    _require(place in ("first", "last") and count >= 0)
    return place, count


TEXT = Rule('["first" or "last", number of text tokens]', _text)


def _hint(value: Any) -> str:
    """Numbers that arrive as text, most often from a YAML file: it takes 1e-3 for a word and wants 1.0e-3."""
    if not isinstance(value, str):
        return ""
    try:
        number = int(value) if value.strip().isdecimal() else float(value)
        return f"This is text; write the number as {number!r}."
    except ValueError:
        return ""
