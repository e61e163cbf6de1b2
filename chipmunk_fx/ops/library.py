"""The operators torch.ops.chipmunk.*: schemas, what a tracer sees of them, and the plain PyTorch that runs them.

Every argument named with "!" is written in place and read by later calls; nothing else is. The operators take part in
graphs as opaque calls, serve any device, and leave gradients to the caller (they are used where none are needed).

`span` and the lists of attention are met here, before an implementation sees the call. Keys outside of a span are cut off, so
that kernels without a mask serve a sequence that is padded at its ends. Lists are unpacked from what is kept of them, and new
ones are packed (packing.py): implementations know int32 lists alone.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.ops.attention import attention_dense, attention_refresh, attention_sparse
from chipmunk_fx.ops.mlp import mlp_refresh, mlp_sparse
from chipmunk_fx.ops.packing import PLAIN, Bits, Kept
from chipmunk_fx.ops.region import region_add, region_store
from chipmunk_fx.ops.rotary import empty, rotary
from chipmunk_fx.ops.transfer import cache_fetch, cache_store, cache_watch

NAMESPACE = "chipmunk"

_MLP = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor? wu, Tensor? bu, Tensor w2, Tensor? b2, Tensor? order, Tensor clock, "
    "Tensor(a!) hidden, Tensor(b!) out, Tensor(c!) mean, Tensor(d!) lists, Tensor(e!) by_neuron, "
    "Tensor(f!)? w1_fp8, Tensor(g!)? scales, Tensor(h!)? change_scale, *, str activation, int group_rows"
)
SCHEMAS = MappingProxyType(
    {
        "attention_dense": (
            "(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor? span, *, float scale, str sdpa) -> Tensor"
        ),
        "attention_refresh": (
            "(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor? always, Tensor? valid, Tensor? span, Tensor clock, "
            "Tensor? known, Tensor(a!) rest, Tensor(b!) share, Tensor(c!) lists, Tensor(d!)? lse, *, float scale, "
            "int group_rows, float random_density, float power, int mass_stride, bool renew, bool ragged, int seed, int site, "
            "str sdpa) -> Tensor"
        ),
        "attention_sparse": (
            "(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor? valid, Tensor? span, Tensor rest, Tensor share, "
            "Tensor lists, *, float scale, int group_rows, bool ragged, str sdpa) -> Tensor"
        ),
        "rotary": (
            "(Tensor[] parts, Tensor?[] weights, Tensor?[] cos, Tensor?[] sin, *, float eps, int dim, bool paired) -> Tensor"
        ),
        "region_store": "(Tensor start, Tensor stop, Tensor(a!) residual, Tensor(b!)? change) -> ()",
        "region_add": "(Tensor start, Tensor residual) -> Tensor",
        "cache_fetch": (
            "(Tensor(a!)[] ready, Tensor[] host, Tensor(b!)[] stage, Tensor lanes, Tensor? after, *, int lane, int coming) "
            "-> ()"
        ),
        "cache_store": "(Tensor[] stage, Tensor(a!)[] host, Tensor lanes, *, int lane) -> ()",
        "cache_watch": "(Tensor cache, Tensor(a!) broken, *, int columns) -> ()",
        "mlp_refresh": f"({_MLP}) -> Tensor",
        "mlp_sparse": f"({_MLP}, float random_density, int seed, int site) -> Tensor",
    }
)
REFERENCE: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        "attention_dense": attention_dense,
        "attention_refresh": attention_refresh,
        "attention_sparse": attention_sparse,
        "rotary": rotary,
        "region_store": region_store,
        "region_add": region_add,
        "cache_fetch": cache_fetch,
        "cache_store": cache_store,
        "cache_watch": cache_watch,
        "mlp_refresh": mlp_refresh,
        "mlp_sparse": mlp_sparse,
    }
)
ON_STREAMS = ("cache_fetch", "cache_store")  # leave work on other streams behind, which no CUDA graph may


Choose = Callable[[str, Mapping[str, Any]], Callable[..., Tensor]]


def argument_names(op: str, keywords: bool = False) -> list[str]:
    """The positional arguments of `op`, or its keyword-only ones, in order."""
    schema = getattr(getattr(torch.ops, NAMESPACE), op).default._schema
    return [argument.name for argument in schema.arguments if argument.kwarg_only == keywords]


def implementation(op: str, choose: Choose, bits: Bits = PLAIN) -> Callable[..., Tensor]:
    """What the dispatcher calls for `op`: `choose` is given the arguments by name, and its answer is called with them.

    bits: how lists that are kept as bits are packed and unpacked.
    """
    names = argument_names(op)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        kept = Kept.of(arguments)
        arguments = settled(arguments)
        if kept is None:
            return choose(op, arguments)(**arguments)
        keys, renew = arguments["k"].shape[2], arguments.get("renew", False)
        arguments["lists"] = kept.empty() if renew else kept.unpacked(keys, bits)
        out = choose(op, arguments)(**arguments)
        if renew:
            kept.pack(arguments["lists"], keys, bits)
        return out

    return run


def settled(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without `known` and `span`, which the host reads: `again` where a refresh has been before, `renew` where it
    has not, and keys (k, v and always) cut to the span, so that all that are left are valid.

    A span of -1 says that valid keys are no single run: `valid` is followed.
    """
    if "known" in arguments:
        known = arguments.pop("known")
        arguments["again"] = known is not None and bool(known)
        arguments["renew"] |= known is not None and not arguments["again"]
    span = arguments.pop("span", None)
    start, stop = (-1, -1) if span is None else span.tolist()
    if start < 0:
        return arguments
    for name, dim in (("k", 2), ("v", 2), ("always", 1)):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].narrow(dim, start, stop - start)
    return arguments | {"valid": None}


def attention_fake(q: Tensor, *_, **__) -> Tensor:
    """[B, H, N, D] over contiguous [B, N, H, D]."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def mlp_fake(x: Tensor, w1: Tensor, b1: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, *_, **__) -> Tensor:
    """[..., C2], contiguous."""
    return x.new_empty(*x.shape[:-1], w2.shape[0])


def region_fake(start: Tensor, residual: Tensor) -> Tensor:
    """[..], contiguous."""
    return residual.new_empty(start.shape)


FAKES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "attention": attention_fake,
        "mlp": mlp_fake,
        "rotary": lambda parts, weights, cos, sin, *, eps, dim, paired: empty(parts, dim),
        "region_store": lambda start, stop, residual, change: None,
        "region_add": region_fake,
        "cache": lambda *_, **__: None,
    }
)


def _define() -> torch.library.Library:
    # kept alive by the module: the operators vanish with it
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        # exact strides: inputs arrive as the model laid them out, so that Inductor neither pads nor copies them
        tags = (torch.Tag.needs_exact_strides, *((torch.Tag.cudagraph_unsafe,) if name in ON_STREAMS else ()))
        library.define(name + schema, tags=tags)
        library.impl(name, implementation(name, lambda op, _: REFERENCE[op]), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES.get(name) or FAKES[name.split("_")[0]], lib=library)
    return library


LIBRARY = _define()
