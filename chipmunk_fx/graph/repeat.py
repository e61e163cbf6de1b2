"""Trace what repeats once: a node that came before with inputs of the same form is copied, not traced again.

The blocks of a model differ in their weights, not in the operations that they become, and recording one of these is ten
times the work of copying it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, snapshot_fake, track_tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

_PLAIN = (int, float, bool, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
_COPIED = ("tensor_meta", "original_aten", "eager_input_vals")  # the rest of a node's meta is of its own place


@dataclass(frozen=True)
class _Value:
    """A tensor in the memory of the input at place `memory`, or of what was first made in a memory beyond the inputs'."""

    memory: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Recorded:
    """The nodes that a call became, of tensors that were the nodes `inputs`, and of each node its value.

    `results`: the node of each, or the place of the input that it is. `moved`: the node that stands for an input from then on.
    """

    inputs: tuple[fx.Node, ...]
    nodes: dict[fx.Node, Any]
    values: tuple[_Value, ...]
    results: tuple[fx.Node | int, ...]
    form: TreeSpec
    moved: dict[int, fx.Node]

    def again(self, tracer: Any, tensors: Sequence[Any], inputs: Sequence[fx.Node]) -> Any:
        copied = dict(zip(self.inputs, inputs, strict=True))
        made = iter(_made(self.values, tensors))
        for old, value in self.nodes.items():
            args, kwargs = fx.map_arg((old.args, old.kwargs), copied.__getitem__)
            copied[old] = new = tracer.create_node("call_function", old.target, args, kwargs, old.name)
            new.meta |= {key: old.meta[key] for key in _COPIED if key in old.meta}
            one = isinstance(value, _Value)
            new.meta["val"] = next(made) if one else tree_map_only(_Value, lambda _: next(made), value)

        def tracked(tensor: Tensor, node: fx.Node) -> Tensor:
            track_tensor(tensor, fx.Proxy(copied[node], tracer), constant=None, tracer=tracer)
            return tensor

        for place, node in self.moved.items():
            tracked(tensors[place], node)
        # a value may yet be laid out anew in place, the node keeps what it was
        fresh = [r if isinstance(r, int) else snapshot_fake(copied[r].meta["val"]) for r in self.results]
        pairs = zip(self.results, fresh, strict=True)
        return tree_unflatten([tensors[r] if isinstance(r, int) else tracked(v, r) for r, v in pairs], self.form)


class Repeating(fx.Interpreter):
    """Runs a graph inside a trace by `make_fx`. Dynamic sizes, constants and operations that write are always traced."""

    def __init__(self, module: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self._seen: dict[Any, _Recorded | None] = {}
        self._regions: list[torch.amp.autocast] = []  # that the graph is in

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:  # what cannot be traced may end inside
            while self._regions:
                self._regions.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _enter_autocast:  # called as such it would be recorded, but not change what dtypes follow
            self._regions.append(torch.amp.autocast(*args))
            return self._anew(self._regions[-1].__enter__())
        if target is _exit_autocast:
            return self._anew(self._regions.pop().__exit__(None, None, None))
        return self._once(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._once(super().call_method, target, args, kwargs)

    def _anew(self, result: Any = None) -> Any:
        """Forget what was seen: how what follows is traced may have changed, by autocast or gradients."""
        self._seen.clear()
        return result

    def _once(self, run: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        mode = get_proxy_mode()
        assert mode is not None
        values, form = tree_flatten((args, kwargs))
        tensors = list({id(v): v for v in values if isinstance(v, Tensor)}.values())
        if not tensors:
            result = run(target, args, kwargs)
            if not any(isinstance(leaf, Tensor | int | float) for leaf in tree_leaves(result)):
                self._anew()
            return result
        with torch._C.DisableTorchFunction():  # the modes of a trace would be asked at every look at a tensor
            key, inputs = _key(values, tensors), _nodes(tensors, mode.tracer)
            known = None if key is None or inputs is None else self._seen.get(key := (target, form, key))
            if known and inputs is not None:
                return known.again(mode.tracer, tensors, inputs)
        last = next(iter(reversed(mode.tracer.graph.nodes)))
        result = run(target, args, kwargs)
        if key is not None and inputs is not None and key not in self._seen:
            with torch._C.DisableTorchFunction():
                self._seen[key] = _recorded(last, inputs, tensors, result, mode.tracer)
        return result


def _made(values: Sequence[_Value], tensors: Sequence[Any]) -> list[Tensor]:
    """The values in the memories of `tensors` and in new ones. Below all modes, as FakeTensorMode makes what it has seen."""
    mode, owners, raw = tensors[0].fake_mode, list(tensors), []
    with no_python_dispatcher(), in_kernel_invocation_manager(mode):
        for value in values:
            if value.memory == len(owners):
                raw.append(torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta"))
                owners.append(raw[-1])
            else:
                raw.append(torch.as_strided(owners[value.memory], value.shape, value.stride, value.offset))
    return [FakeTensor(mode, tensor, value.device) for tensor, value in zip(raw, values, strict=True)]


def _key(values: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """All that a trace can depend on, where it is known to be that."""
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    parts = [_form(v, places[id(v)]) if isinstance(v, Tensor) else _literal(v) for v in values]
    return None if None in parts else (tuple(_memories(tensors)), *parts)


def _memories(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor, the place of the first that lies in the same memory."""
    memories = [tensor.untyped_storage()._cdata for tensor in tensors]
    return [memories.index(memory) for memory in memories]


def _form(tensor: Tensor, place: int) -> tuple[Any, ...] | None:
    plain = isinstance(tensor, FakeTensor) and tensor.layout is torch.strided and not tensor._has_symbolic_sizes_strides
    if not plain or tensor.is_conj() or tensor.is_neg():
        return None
    laid = tensor.shape, tensor.stride(), tensor.storage_offset()
    return place, type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, *laid


def _literal(value: Any) -> tuple[Any, ...] | None:
    """With its type: 1, 1.0 and True are equal."""
    if isinstance(value, slice):
        bounds = [_literal(bound) for bound in (value.start, value.stop, value.step)]
        return None if None in bounds else (slice, *bounds)
    return (type(value), repr(value)) if type(value) in _PLAIN else None


def _nodes(tensors: Sequence[Tensor], tracer: Any) -> tuple[fx.Node, ...] | None:
    """The node that makes each of the tensors; None where one is a constant."""
    slots = [get_proxy_slot(tensor, tracer, None) for tensor in tensors]
    if any(slot is None or slot.constant is not None for slot in slots):  # pyright: ignore
        return None
    return tuple(slot.proxy.node for slot in slots)  # pyright: ignore


def _recorded(
    last: fx.Node, inputs: tuple[fx.Node, ...], tensors: Sequence[Tensor], result: Any, tracer: Any
) -> _Recorded | None:
    """What was recorded after the node `last`, where it does nothing but compute `result` of `inputs`."""
    nodes, node = [], last.next
    while node.op != "root":
        nodes.append(node)
        node = node.next
    leaves, form = tree_flatten(result)
    if not all(isinstance(leaf, Tensor) and _form(leaf, 0) for leaf in leaves):
        return None
    now, made, known = _nodes(tensors, tracer), _nodes(leaves, tracer), {*inputs, *nodes}
    pure = all(_computes(node) and known.issuperset(node.all_input_nodes) for node in nodes)
    if not pure or now is None or made is None or not known.issuperset((*now, *made)):
        return None
    places, owners = {id(tensor): place for place, tensor in enumerate(tensors)}, list(tensors)
    valued = {node: tree_map_only(Tensor, lambda value: _value(value, owners), node.meta["val"]) for node in nodes}
    flat = tree_leaves(list(valued.values()))
    if not all(isinstance(value, _Value) for value in flat):
        return None
    results = tuple(places.get(id(leaf), node) for leaf, node in zip(leaves, made, strict=True))
    moved = {place: node for place, (node, old) in enumerate(zip(now, inputs, strict=True)) if node is not old}
    return _Recorded(inputs, valued, tuple(flat), results, form, moved)


def _value(tensor: Tensor, owners: list[Tensor]) -> _Value | None:
    """How to make another like it; `owners`, of each memory the first tensor in it, takes in one in a new memory."""
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    memory = _memories([*owners, tensor])[-1]
    if memory == len(owners):
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if offset or tensor.untyped_storage().nbytes() != extent * tensor.element_size():
            return None  # it is part of what is not seen here
        owners.append(tensor)
    if owners[memory].dtype != tensor.dtype or not _form(tensor, 0):
        return None
    return _Value(memory, shape, stride, offset, tensor.dtype, tensor.device)


def _computes(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem
