"""A small pattern language over ATen graphs.

An expression is a tree of `Call` (an op with its arguments), `Var` (binds what stands there), `Named` (a node that occurs
again), `OneOf` (tagged alternatives, tried in order), `Literal` (a constant that must satisfy a test), `Among` and `Each`
(one part, or every part, of a list), `Where` (a condition on the node), `Range` (part of a last dimension) and `Function`
(a pointwise function in any spelling). Matching starts at an anchor node and walks back through value-preserving ops.
Every argument of an op that a pattern does not name must have its schema default: a keyword that the author forgot is a
mismatch, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import ALIASES, CASTS, arguments, is_identity
from chipmunk_fx.graph.columns import columns
from chipmunk_fx.graph.pointwise import described, name_of, origins


@dataclass(frozen=True)
class Var:
    """Binds any value; a second occurrence of the name must be the same node, or an alias of it."""

    name: str


@dataclass(frozen=True)
class Named:
    """What matches `expression`, bound to a name by which a `Var` finds it again."""

    name: str
    expression: Expression


@dataclass(frozen=True)
class Literal:
    """A constant for which `test` holds; `wanted` describes it in reasons."""

    test: Callable[[Any], bool]
    wanted: str


@dataclass(frozen=True)
class Call:
    """One of `ops`, its arguments by schema name. `commutes` names two arguments that may be swapped."""

    ops: tuple[Any, ...]
    args: Mapping[str, Any]
    commutes: tuple[str, str] | None = None
    output: int | None = None  # for ops that return a list: which element (a getitem node stands between)


@dataclass(frozen=True)
class OneOf:
    """Alternatives by tag; the tag of the one that matched is recorded under `name`."""

    name: str
    options: Mapping[str, Expression]


@dataclass(frozen=True)
class Among:
    """A list argument with an element that matches `expression`; binds its `index` and the `others`, in order."""

    expression: Expression
    index: str
    others: str


@dataclass(frozen=True)
class Each:
    """A list argument whose elements match `expressions`, one by one."""

    expressions: tuple[Expression, ...]


@dataclass(frozen=True)
class Where:
    """What matches `expression` and passes `test`, which sees the node; `wanted` describes it in reasons."""

    test: Callable[[fx.Node], bool]
    wanted: str
    expression: Expression


@dataclass(frozen=True)
class Range:
    """A contiguous range of the last dimension of what matches `expression`; binds its `Columns`, None for all of it."""

    name: str
    expression: Expression


@dataclass(frozen=True)
class Function:
    """A pointwise function of what matches `expression`, told by its values; binds which of the `known` it is.

    `wanted` describes those in reasons.
    """

    name: str
    known: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    expression: Expression
    wanted: str


Expression = Var | Named | Literal | Call | OneOf | Among | Each | Where | Range | Function


@dataclass(frozen=True)
class Found:
    """What a match bound so far. `nodes` are the ops that the match explains, outermost first."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def bind(self, name: str, value: Any) -> Found:
        return replace(self, bound={**self.bound, name: value})

    @property
    def depth(self) -> int:
        """Ops of the pattern that matched; casts and value-preserving ones on the way do not count."""
        return sum(not is_identity(node) and node.target not in CASTS for node in self.nodes)

    def explain(self, *nodes: fx.Node) -> Found:
        return replace(self, nodes=self.nodes + nodes)


@dataclass(frozen=True)
class Mismatch:
    """Where a match ended: the node, what the pattern wants there, what was seen, how many ops had matched."""

    node: fx.Node | None
    wanted: str
    seen: str
    depth: int

    def __str__(self) -> str:
        return f"wanted {self.wanted}, saw {self.seen}" + (f" at {self.node}" if self.node is not None else "")


def match(expression: Expression, value: Any, found: Found | None = None) -> Found | Mismatch:
    """Match `value` (a node or literal) against `expression`; the first success, or the deepest mismatch (of these the last)."""
    deepest: Mismatch | None = None
    for result in _attempts(expression, value, found or Found()):
        if isinstance(result, Found):
            return result
        if deepest is None or result.depth >= deepest.depth:
            deepest = result
    assert deepest is not None
    return deepest


def heads(expression: Expression) -> tuple[Any, ...]:
    """The ops that a match of `expression` may begin with."""
    if isinstance(expression, Call):
        return expression.ops
    if isinstance(expression, OneOf):
        return tuple(dict.fromkeys(op for option in expression.options.values() for op in heads(option)))
    if isinstance(expression, Where):
        return heads(expression.expression)
    raise TypeError(f"a pattern begins with a Call, not with {type(expression).__name__}")


def _attempts(expression: Expression, value: Any, found: Found) -> Iterator[Found | Mismatch]:
    if isinstance(expression, Var):
        known = found.bound.get(expression.name, value)
        between = _aliases(value)
        if known == value:
            yield found.bind(expression.name, value)
        elif between and between[-1].args[0] is known:
            yield found.explain(*between)
        else:
            yield _mismatch(value, f"the same {expression.name} as before ({known})", str(value), found)
    elif isinstance(expression, Named):
        for result in _attempts(Var(expression.name), value, found):
            yield from _attempts(expression.expression, value, result) if isinstance(result, Found) else [result]
    elif isinstance(expression, Literal):
        ok = not isinstance(value, fx.Node) and expression.test(value)
        yield found if ok else _mismatch(value, expression.wanted, repr(value), found)
    elif isinstance(expression, OneOf):
        for tag, option in expression.options.items():
            for result in _attempts(option, value, found):
                yield result.bind(expression.name, tag) if isinstance(result, Found) else result
    elif isinstance(expression, Among):
        yield from _among(expression, value, found)
    elif isinstance(expression, Where):
        if isinstance(value, fx.Node) and expression.test(value):
            yield from _attempts(expression.expression, value, found)
        else:
            yield _mismatch(value, expression.wanted, _describe(value), found)
    elif isinstance(expression, Range):
        yield from _range(expression, value, found)
    elif isinstance(expression, Function):
        yield from _function(expression, value, found)
    elif isinstance(expression, Each):
        if isinstance(value, (list, tuple)) and len(value) == len(expression.expressions):
            wanted = {str(i): part for i, part in enumerate(expression.expressions)}
            yield from _all(list(wanted.items()), {str(i): v for i, v in enumerate(value)}, found)
        else:
            yield _mismatch(value, f"a list of {len(expression.expressions)}", _describe(value), found)
    else:
        yield from _call(expression, value, found)


def _call(expression: Call, value: Any, found: Found) -> Iterator[Found | Mismatch]:
    names = " or ".join(str(op) for op in expression.ops)
    while is_identity(value):
        found, value = found.explain(value), value.args[0]
    if expression.output is not None:
        if not _is_getitem(value) or value.args[1] != expression.output:
            yield _mismatch(value, f"output {expression.output} of {names}", _describe(value), found)
            return
        found, value = found.explain(value), value.args[0]
    if not isinstance(value, fx.Node) or value.target not in expression.ops:
        yield _mismatch(value, names, _describe(value), found)
        return
    actual = arguments(value)
    defaults = {a.name: a.default_value for a in value.target._schema.arguments if a.has_default_value()}  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    for name, given in actual.items():
        if name not in expression.args and (name not in defaults or given != defaults[name]):
            yield _mismatch(value, f"{names} with {name}={defaults.get(name)!r}", f"{name}={given!r}", found)
            return
    for spelled in _spellings(expression):
        yield from _all(list(spelled.items()), actual, found.explain(value))


def _aliases(value: Any) -> list[fx.Node]:
    """`value` and what it is an alias of, as far as these are aliases."""
    found = []
    while isinstance(value, fx.Node) and value.target in ALIASES:
        found.append(value)
        value = value.args[0]
    return found


def _spellings(expression: Call) -> Iterator[Mapping[str, Any]]:
    yield expression.args
    if expression.commutes:
        a, b = expression.commutes
        yield {**expression.args, a: expression.args[b], b: expression.args[a]}


def _all(wanted: list[tuple[str, Any]], actual: Mapping[str, Any], found: Found) -> Iterator[Found | Mismatch]:
    """Every argument in turn, with backtracking into earlier ones."""
    if not wanted:
        yield found
        return
    (name, expression), *rest = wanted
    for result in _attempts(expression, actual.get(name), found):
        if isinstance(result, Mismatch):
            yield result
        else:
            yield from _all(rest, actual, result)


def _among(expression: Among, value: Any, found: Found) -> Iterator[Found | Mismatch]:
    if not isinstance(value, (list, tuple)):
        yield _mismatch(value, "a list of tensors", _describe(value), found)
        return
    for index, part in enumerate(value):
        others = tuple(v for i, v in enumerate(value) if i != index)
        for result in _attempts(expression.expression, part, found):
            if isinstance(result, Found):
                yield result.bind(expression.index, index).bind(expression.others, others)
            else:
                yield result


def _range(expression: Range, value: Any, found: Found) -> Iterator[Found | Mismatch]:
    """All of it first; else ever larger wholes that it is part of."""
    taken, through = None, ()
    for result in _attempts(expression.expression, value, found):
        yield result.bind(expression.name, None) if isinstance(result, Found) else result
    while True:
        while is_identity(value):
            through, value = (*through, value), value.args[0]
        part = columns(value)
        if part is None:
            return
        taken = part if taken is None else taken.within(part)
        through, value = (*through, *part.through), part.source
        for result in _attempts(expression.expression, value, found.explain(*through)):
            yield result.bind(expression.name, taken) if isinstance(result, Found) else result


def _function(expression: Function, value: Any, found: Found) -> Iterator[Found | Mismatch]:
    yield _mismatch(value, expression.wanted, _describe(value), found)
    for origin, between in origins(value) if isinstance(value, fx.Node) else ():
        name = name_of(between, origin, expression.known)
        for result in _attempts(expression.expression, origin, found.explain(*between)):
            if isinstance(result, Found):
                unknown = Mismatch(value, expression.wanted, described(between) or "no function", result.depth)
                yield unknown if name is None else result.bind(expression.name, name)
            elif name is not None:
                yield result


def _is_getitem(value: Any) -> bool:
    return isinstance(value, fx.Node) and getattr(value.target, "__name__", "") == "getitem"


def _mismatch(value: Any, wanted: str, seen: str, found: Found) -> Mismatch:
    return Mismatch(value if isinstance(value, fx.Node) else None, wanted, seen, found.depth)


def _describe(value: Any) -> str:
    return f"{value.target} ({value.name})" if isinstance(value, fx.Node) else repr(value)
