"""Walks over an ATen graph: where a value comes from, what it reaches, what may have changed it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments

aten = torch.ops.aten

LINEAR = (aten.linear.default,)
NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
PROJECTIONS = (*LINEAR, aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints),
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.movedim.intlist),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.expand.default),
    *(aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default, aten.dropout.default),
    *(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device, aten.type_as.default),
)


# pointwise, though PyTorch does not say so
_UNTAGGED = (
    *(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.masked_fill.Tensor, aten.rsub.Tensor),
    *(aten.floor_divide.default, aten.floor_divide.Scalar),
)

Edge = Callable[[fx.Node, fx.Node], bool]
"""What is asked of a node and one of its users."""


def strip(value: fx.Node, through: Iterable[object] = VIEWS) -> fx.Node:
    """Walk back through views and casts to the node that made the values."""
    through = tuple(through)
    while value.op == "call_function" and value.target in through and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value


def ancestors(start: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Nodes reached walking back from `start`, nearest first; nodes for which `stop` holds are kept, not passed."""
    seen, queue, order = {start}, [start], []
    while queue:
        node = queue.pop(0)
        order.append(node)
        if node is not start and stop(node):
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return order


def projections(value: fx.Node) -> list[fx.Node]:
    """The linears (or convolutions) nearest behind `value`: what projected it from the streams."""
    found = [n for n in ancestors(value, lambda n: n.target in PROJECTIONS) if n.target in PROJECTIONS]
    # A linear over [B, C] is conditioning (time, pooled text), not a stream of tokens, where streams are there too.
    wide = [n for n in found if rank(n) >= 3]
    return wide or found


def roots(value: fx.Node) -> frozenset[fx.Node]:
    """The streams that `value` was projected from: views, casts and projections in a row (low rank, LoRA) stripped."""
    through = (*VIEWS, *LINEAR)
    found = [strip(n.args[0], through) for n in projections(value) if isinstance(n.args[0], fx.Node)]
    return frozenset(stream for node in found for stream in _joined(node, through))


def origins(value: fx.Node) -> frozenset[fx.Node]:
    """The streams behind `roots`: norms and further projections, with or without norms between them, stripped, too."""
    through = (*VIEWS, *PROJECTIONS, *NORMS)
    return frozenset(stream for root in roots(value) for stream in _joined(strip(root, through), through))


def _joined(node: fx.Node, through: Iterable[object]) -> list[fx.Node]:
    """The streams of which `node` [batch, tokens, width] is the concatenation along its tokens; else itself."""
    if node.target is not aten.cat.default or rank(node) < 3:
        return [node]
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or dim % rank(node) == rank(node) - 1:
        return [node]
    return [stream for part in parts for stream in _joined(strip(part, through), through)]  # pyright: ignore


def placeholders(value: fx.Node) -> list[fx.Node]:
    """All graph inputs that `value` depends on, nearest first."""
    return [n for n in ancestors(value, lambda n: False) if n.op == "placeholder"]


def moved_by(value: fx.Node) -> fx.Node | None:
    """An input of the call, other than parameters and buffers, that `value` depends on: it may change from step to step."""
    return next((n for n in placeholders(value) if not is_parameter(n)), None)


def is_parameter(node: fx.Node) -> bool:
    """Whether an input of the graph is a parameter or a buffer."""
    static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    return static or isinstance(node.meta.get("val"), torch.nn.Parameter)


def depending(value: fx.Node) -> set[fx.Node]:
    """All nodes that depend on `value`."""
    return behind(value.graph, [value])


def behind(graph: fx.Graph, values: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on one of the `values`."""
    values, found = set(values), set()
    for node in graph.nodes:
        if any(n in values or n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def reaches(start: fx.Node, through: Iterable[object], goal: Edge, also: Edge = lambda node, user: False) -> bool:
    """Whether a walk forward from `start` over ops in `through`, and edges for which `also` holds, finds one for `goal`."""
    through, seen, queue = tuple(through), {start}, [start]
    while queue:
        node = queue.pop()
        for user in node.users:
            if goal(node, user):
                return True
            if user not in seen and (user.target in through or also(node, user)):
                seen.add(user)
                queue.append(user)
    return False


def is_used(node: fx.Node) -> bool:
    """Whether anything comes of the node: a result of the graph, or a write."""
    seen, queue = {node}, [node]
    while queue:
        node = queue.pop()
        if node.op == "output" or getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            return True
        fresh = [user for user in node.users if user not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def mutated_between(first: fx.Node, last: fx.Node, values: Iterable[fx.Node]) -> fx.Node | None:
    """An in-place op between two nodes that writes to memory of one of `values`: moving reads past it is wrong."""
    storages = {s for v in values if (s := storage(v)) is not None}
    node = first.next
    while node is not last and node.op != "root":
        if any(storage(target) in storages for target in written(node)):
            return node
        node = node.next
    return None


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = arguments(node)
    into = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [n for x in into for n in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(n, fx.Node)]


def writers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The ops that write in place to memory of `nodes`, or by way of a view of it."""
    queue, seen, writers = list(nodes), set(), []
    while queue:
        node = queue.pop()
        for user in (u for u in node.users if u not in seen and storage(node) is not None):
            if any(storage(target) == storage(node) for target in written(user)):
                writers.append(user)
            if storage(user) == storage(node):
                seen.add(user)
                queue.append(user)
    return writers


def is_pointwise(node: fx.Node) -> bool:
    """Whether each value of the result comes of one of each operand."""
    return node.target in _UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ())


def rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def shape(node: fx.Node) -> tuple:
    """Sizes of the node's value, or of the first of several; symbolic sizes stay symbolic."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)


def storage(node: fx.Node) -> int | None:
    """What tells the memory behind a value, None where it is no tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
