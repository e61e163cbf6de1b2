"""What a graph does beside giving its results: whether a call of it can be made over."""

from __future__ import annotations

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.walk import storage, written

PURE = ("aten", "prims")  # namespaces whose operators say of themselves what they write and draw
SILENT = ("batch_norm", "instance_norm")  # but for these, which keep running means without saying so
_MODULES = ("_operator", "math", "torch", "torch.amp.autocast_mode", "torch._C")  # of plain functions in graphs


def writes_inputs(graph: fx.Graph) -> bool:
    """Whether a call changes one of its inputs, or a constant of the graph."""
    kept = {storage(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    return any(storage(value) in kept for node in graph.nodes for value in (*written(node), *_running(node)))


def repeatable(graph: fx.Graph) -> bool:
    """Whether a call that is made over leaves all as one call does: it changes no input and draws no random numbers, and has no
    operator of others', which need not say what they do."""
    called = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return all(_is_known(node) and not draws(node) for node in called) and not writes_inputs(graph)


def _is_known(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in PURE
    return getattr(node.target, "__module__", None) in _MODULES


def draws(node: fx.Node) -> bool:
    """Whether it takes random numbers: not where it would drop values, but none in fact."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return given.get("dropout_p", given.get("p")) != 0 and given.get("train") is not False


def _running(node: fx.Node) -> list[fx.Node]:
    """The running means that a norm renews."""
    if node.op != "call_function" or not any(name in str(node.target) for name in SILENT):
        return []
    given = arguments(node)
    renews = given.get("training", given.get("use_input_stats")) is not False
    means = (given.get("running_mean"), given.get("running_var")) if renews else ()
    return [mean for mean in means if isinstance(mean, fx.Node)]
