"""What a graph does beside giving its results: whether a call of it can be made over."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

PURE = ("aten", "prims")  # namespaces whose operators say of themselves what they write and draw
SILENT = ("batch_norm", "instance_norm")  # but for these, which keep running means without saying so
_MODULES = ("_operator", "math", "torch", "torch.amp.autocast_mode", "torch._C")  # of plain functions in graphs


def writes_inputs(graph: fx.Graph) -> bool:
    """Whether a call changes one of its inputs, or a constant of the graph."""
    return any(_root(value).op in ("placeholder", "get_attr") for node in graph.nodes for value in _written(node))


def repeatable(graph: fx.Graph) -> bool:
    """Whether a call that is made over leaves all as one call does: it changes no input and draws no random numbers, and has no
    operator of others', which need not say what they do."""
    called = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return all(_is_known(node) and not _draws(node) for node in called) and not writes_inputs(graph)


def _is_known(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in PURE
    return getattr(node.target, "__module__", None) in _MODULES


def _draws(node: fx.Node) -> bool:
    """Whether it takes random numbers: not where it would drop values, but none in fact."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = {argument.name: value for argument, value in _arguments(node)}
    return given.get("dropout_p", given.get("p")) != 0 and given.get("train") is not False


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Each argument of the operator's schema, and what the node gives for it."""
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema else ()):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        yield argument, given


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node changes in place."""
    given = {argument.name: value for argument, value in _arguments(node)}
    for argument, value in _arguments(node):
        running = argument.name in ("running_mean", "running_var") and _is_training(node, given)
        if running or (argument.alias_info is not None and argument.alias_info.is_write):
            yield from _nodes(value)


def _is_training(node: fx.Node, given: dict[str, Any]) -> bool:
    named = any(name in str(node.target) for name in SILENT)
    return named and given.get("training", given.get("use_input_stats", True)) is not False


def _nodes(value: Any) -> list[fx.Node]:
    """Those in an argument, which may be a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if isinstance(one, fx.Node)]


def _root(node: fx.Node) -> fx.Node:
    """What the value shares its memory with, of those that it is a view of."""
    while node.op == "call_function":
        viewed = node.args[:1] if node.target is operator.getitem else _viewed(node)
        if not viewed:
            return node
        node = viewed[0]
    return node


def _viewed(node: fx.Node) -> list[fx.Node]:
    return [one for argument, value in _arguments(node) if argument.alias_info is not None for one in _nodes(value)]
