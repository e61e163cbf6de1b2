"""Re-trace Dynamo's graph to pre-dispatch ATen, where every idea has one spelling.

Parameters stay placeholders in the same order, so a call's arguments serve the captured graph unchanged.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from warnings import catch_warnings

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from chipmunk_fx.graph.contractions import to_products
from chipmunk_fx.graph.inplace import out_of_place
from chipmunk_fx.graph.opening import open_up
from chipmunk_fx.graph.repeat import Repeating

aten = torch.ops.aten

_SYNONYMS = MappingProxyType(
    {
        aten.view.default: aten.reshape.default,
        aten.concat.default: aten.cat.default,
        aten.concatenate.default: aten.cat.default,
        aten.swapaxes.default: aten.transpose.int,
        aten.swapdims.default: aten.transpose.int,
        aten.moveaxis.int: aten.movedim.int,
        aten.moveaxis.intlist: aten.movedim.intlist,
        aten.multiply.Tensor: aten.mul.Tensor,
        aten.divide.Tensor: aten.div.Tensor,
        aten.true_divide.Tensor: aten.div.Tensor,
        aten.subtract.Tensor: aten.sub.Tensor,
        aten.special_expit.default: aten.sigmoid.default,
    }
)
_KERNELS = 5  # that a context puts back when it is left: all
_OF_DYNAMO = ("dynamo_compile_id",)  # a graph without it has no static inputs for AOTAutograd, hence no CUDA graphs
SDPA_CHOICE = "chipmunk_sdpa"  # in a node's meta["custom"]: names of the attention kernels that the user allows there


class Uncapturable(Exception):
    """This graph cannot be re-traced faithfully; `str()` says why. The caller compiles it untouched."""


@dataclass(frozen=True)
class Input:
    """One placeholder: its name in the user's terms, whether it is a parameter or buffer, and its fake value."""

    name: str
    is_parameter: bool
    value: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


@dataclass(frozen=True)
class Capture:
    """The ATen graph with its inputs (same order as the placeholders) and the tracing context to compile it in.

    `dynamic`: compiling may add guards, or tell Dynamo to begin again. `numbers`: those that the model was given, by the
    user's names; most are constants of the graph.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    context: TracingContext
    dynamic: bool
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def fakes(self) -> list[Any]:
        return [entry.value for entry in self.inputs]


def capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Re-trace `graph_module` (as Dynamo hands it to a backend). Raises `Uncapturable` with the reason."""
    context = TracingContext.get()
    fakes = [_fake(value, context) for value in example_inputs]
    source = copy.deepcopy(graph_module.graph)
    open_up(source, graph_module)
    _refuse_opaque(source)
    _drop_autocast(source)
    _detach_data(source)
    _note_attention_kernels(source)

    def run(*args: Any) -> Any:
        return Repeating(graph_module, source).run(*args)

    try:
        with fx_traceback.preserve_node_meta(), context.fake_mode, torch.no_grad():  # pyright: ignore[reportOptionalContextManager]
            traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*fakes)
    except Exception as error:  # any tracing failure leaves the user's graph as it was
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # the rest tells of PyTorch's own code
        raise Uncapturable(f"re-tracing failed: {_number_that_indexes(source) or said}") from error
    if any(isinstance(attribute(traced, n), FakeTensor) for n in traced.graph.nodes if n.op == "get_attr"):
        raise Uncapturable("the re-trace captured a tensor made inside the graph as a constant")
    _one_spelling(traced)
    out_of_place(traced.graph)
    inputs = _describe(graph_module, traced, fakes)
    to_products(traced.graph)
    traced.recompile()
    dynamic = any(isinstance(f, torch.SymInt) or _has_symbols(f) for f in fakes) or _takes_floats(graph_module)
    return Capture(traced, inputs, context, dynamic, _numbers())


def _number_that_indexes(graph: fx.Graph) -> str | None:
    """`table[t]` with t an integer tensor without dimensions, of which PyTorch makes a number that no graph has."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        index = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
        values = [n.meta.get("example_value") for n in index if isinstance(n, fx.Node)]
        if any(
            isinstance(v, torch.Tensor) and v.dim() == 0 and v.dtype not in (torch.bool, torch.uint8) for v in values
        ):
            return (
                "a tensor is indexed by an integer tensor without dimensions, for each value of which PyTorch compiles a graph: "
                "index by one with a dimension, as in table[t[None]]"
            )
    return None


def user_name(placeholder: fx.Node) -> str:
    """`L['kwargs']['hidden_states']` -> `hidden_states`; module paths keep their dots."""
    source = getattr(placeholder, "_dynamo_source", None)
    return dotted(source.name if isinstance(getattr(source, "name", None), str) else "") or placeholder.name


def dotted(path: str) -> str:
    """A Dynamo source or module-stack path in the user's spelling: `transformer_blocks.0.attn`."""
    words = re.findall(r"\w+", path)
    drop = {"L", "self", "kwargs", "args", "__dict__", "_modules", "_parameters", "_buffers", "_orig_mod", "fn"}
    drop |= {"__self__", "___from_numpy"}
    return ".".join(w for w in words if w not in drop)


def _describe(original: fx.GraphModule, traced: fx.GraphModule, fakes: Sequence[Any]) -> tuple[Input, ...]:
    """Copy source and static-input metadata over by position: Inductor finds parameters by them."""
    olds = [n for n in original.graph.nodes if n.op == "placeholder"]
    news = [n for n in traced.graph.nodes if n.op == "placeholder"]
    inputs = []
    for old, new, fake in zip(olds, news, fakes, strict=True):
        for key in ("tensor_dict", "nn_module_stack", "stack_trace"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source
        is_parameter = isinstance(fake, torch.nn.Parameter) or "_dynamo_static_input_type" in old.meta.get(
            "tensor_dict", {}
        )
        inputs.append(Input(user_name(old), is_parameter, fake))
    traced.meta |= {key: original.meta[key] for key in _OF_DYNAMO if key in original.meta}
    return tuple(inputs)


def _numbers() -> dict[str, float]:
    """Ints and floats among the arguments of the call that Dynamo looks at, by name; those in its `**kwargs` too."""
    try:
        arguments = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # not called by Dynamo
        return {}
    named = [arguments, *(value for value in arguments.values() if isinstance(value, dict))]
    return {name: value for group in named for name, value in group.items() if type(value) in (int, float)}


def _fake(value: Any, context: TracingContext) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    symbolic = context.tensor_to_context.get(value)
    assert context.fake_mode is not None
    if symbolic is None:
        return context.fake_mode.from_tensor(value, static_shapes=True)
    # With its source, so that a dynamic size is the symbol that Dynamo gave it, not a new one that nothing guards.
    return context.fake_mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _refuse_opaque(graph: fx.Graph) -> None:
    if node := next((n for n in graph.nodes if "flex_attention" in _name(n)), None):
        raise Uncapturable(f"{_name(node)} in the graph: its effect would be lost in a re-trace")


def _drop_autocast(graph: fx.Graph) -> None:
    """Remove the regions without autocast where there is none around them: models write them for the day there is."""
    regions: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is torch.amp.autocast_mode._enter_autocast:
            regions.append(node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            entered = regions.pop()
            if not regions and not torch.is_autocast_enabled(str(entered.args[0])) and not _enables(entered):
                graph.erase_node(node)
                graph.erase_node(entered)


def _enables(entered: fx.Node) -> bool:
    """False also for a dtype that the device has no autocast for, of which the user's own call has warned."""
    with catch_warnings(action="ignore"), torch.amp.autocast(*entered.args):  # pyright: ignore[reportArgumentType]
        return torch.is_autocast_enabled(str(entered.args[0]))


def _note_attention_kernels(graph: fx.Graph) -> None:
    """Write on each attention which kernels the `sdpa_kernel` around it allows: a re-trace forgets it."""
    allowed = ""
    for node in graph.nodes:
        if _name(node) == "_sdpa_kernel":
            names = [n.args[0] if isinstance(n, fx.Node) else n.name for n in node.args[0]]
            allowed = "" if len(names) == _KERNELS else ",".join(names)
        elif allowed and _name(node) == "scaled_dot_product_attention":
            node.meta["custom"] = {**node.meta.get("custom", {}), SDPA_CHOICE: allowed}


def _detach_data(graph: fx.Graph) -> None:
    """`x.data` arrives as `_get_data_attr`, which a re-trace rejects; for values it is `detach`."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_get_data_attr":
            node.target, node.kwargs = torch.Tensor.detach, {}


def _one_spelling(module: fx.GraphModule) -> None:
    """ATen's second names for one op become the first.

    `view` becomes `reshape`: it holds for the layout that was traced, and a rewritten site may have another.
    """
    for node in module.graph.nodes:
        if node.target in _SYNONYMS and not node.kwargs:
            node.target = _SYNONYMS[node.target]
    module.recompile()


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a `get_attr` node stands for."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _takes_floats(module: fx.GraphModule) -> bool:
    """Whether an input is a Python float, which Dynamo passes as a tensor; Inductor may refuse such a graph."""
    arguments = [n.meta.get("grapharg") for n in module.graph.nodes if n.op == "placeholder"]
    return any(getattr(argument, "pass_arg_as_tensor", False) for argument in arguments)


def _has_symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
