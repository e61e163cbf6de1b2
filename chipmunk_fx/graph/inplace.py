"""`x += f(x)` becomes `x = x + f(x)` where nothing can tell the two apart.

Then what a block adds is found as if it were written so, and what entered the block is there to be kept.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_OTHERWISE = MappingProxyType(
    {
        aten.add_.Tensor: aten.add.Tensor,
        aten.sub_.Tensor: aten.sub.Tensor,
        aten.mul_.Tensor: aten.mul.Tensor,
        aten.div_.Tensor: aten.div.Tensor,
    }
)


def out_of_place(graph: fx.Graph) -> None:
    """Arithmetic in place, on memory that came from no input and that nothing made before reads afterwards."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    within: dict[int, list[fx.Node]] = {}  # memory -> the nodes so far whose values lie in it
    for node in graph.nodes:
        memories = {v.untyped_storage()._cdata for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)}
        if node.target in _OTHERWISE and _is_value(node):
            before = [n for memory in memories for n in within.get(memory, ())]
            later = (user for n in before for user in n.users if place[user] > place[node])
            if all(n.op == "call_function" for n in before) and not any(later):
                node.target = _OTHERWISE[node.target]
        for memory in memories:
            within.setdefault(memory, []).append(node)


def _is_value(node: fx.Node) -> bool:
    """Whether the result out of place has the type and the sizes of what is written to."""
    values = [n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args[:2]]
    target, *others = values
    alike = torch.result_type(*values) == target.dtype
    return alike and all(
        not isinstance(o, Tensor) or torch.broadcast_shapes(target.shape, o.shape) == target.shape for o in others
    )
