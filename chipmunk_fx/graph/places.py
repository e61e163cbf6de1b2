"""Where in the picture each token of a sequence comes from, or goes to: layout ops run on places in place of values.

So any way of cutting a picture into patches is understood (reshapes and permutes, einops, unfold, pixel shuffles, linears
over channels), and so is putting it together again at the end. Where tokens come and go as they are, their positions may be
laid out within the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from chipmunk_fx.graph.calls import CASTS, SAME, arguments
from chipmunk_fx.graph.sizes import Size, hint, hints, is_data_dependent
from chipmunk_fx.graph.walk import LINEAR, PROJECTIONS, is_pointwise, rank, shape

aten = torch.ops.aten

NOWHERE = -1  # of text, padding, registers
Grid = tuple[int, int, int]
"""(t, h, w) in tokens."""
Raster = Callable[[Tensor], Grid | None]
"""The grid that places [N, axes] enumerate."""


@dataclass(frozen=True)
class Told:
    """(t, h, w), possibly symbolic; the sequence that shows it; on which side of the picture it has other tokens."""

    sizes: tuple[Size, Size, Size]
    node: fx.Node
    side: Literal["first", "last"] | None


_FOLDS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
# whose result is a view of what went in, however large
_VIEWS = (
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.movedim.intlist),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.expand.default),
    *(aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.narrow.default, aten.slice.Tensor),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.select.int),
    operator.getitem,
)
_LAYOUTS = (
    *(*_FOLDS, *_VIEWS, *_PADS, aten.unflatten.int, aten.einsum.default),
    *(aten.cat.default, aten.stack.default, aten.repeat.default, aten.tile.default, aten.flip.default),
    *(aten.roll.default, aten.unfold.default, aten.im2col.default, aten.col2im.default),
    *(aten.pixel_shuffle.default, aten.pixel_unshuffle.default),
)
_MOST = 2**26  # places, 0.5 GB, that are copied at once
_MOST_BYTES = 2**30  # that are copied in all
_ROW_BY_ROW = (*CASTS, *SAME, aten.dropout.default, aten.layer_norm.default, aten.rms_norm.default)
_TRIES = 8  # sequences that are no raster, before it is given up: those of all further blocks are the same
_LAST = 3  # projections, from the last on, that may be the one to pixels


def entering(graph: fx.Graph, latents: fx.Node, fits: Callable[[int], bool], raster: Raster) -> Told | None:
    """The grid of the first sequence that the latents are projected to, of a length that `fits`."""
    sizes = hints(shape(latents))
    flat = torch.arange(prod(sizes), dtype=torch.float64, device="cpu").reshape(sizes)
    projected: set[fx.Node] = set()
    tries = _TRIES
    for node, held in _carried(graph, {latents: flat}):
        if node.target in PROJECTIONS or any(n in projected for n in node.all_input_nodes):
            projected.add(node)
        if node not in projected or not isinstance(held, Tensor) or rank(node) not in (2, 3) or not held.numel():
            continue
        for dim in range(rank(node) - 1):
            row = held.movedim(dim, 0)[:, *[0] * (held.dim() - 1)].long()
            inside = (row != NOWHERE).nonzero().squeeze(1)
            if not _is_run(inside) or not fits(len(inside)):
                continue
            if sizes := _sizes(shape(latents), row[inside], raster):
                return Told(sizes, node, _side(inside, len(row)))
            tries -= 1
        if tries <= 0:
            return None
    return None


def leaving(graph: fx.Graph, fits: Callable[[int], bool], raster: Raster) -> Told | None:
    """The grid of the last sequence that is projected to pixels, and put together to the picture that is returned."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    pictures = [n for n in output.all_input_nodes if rank(n) >= 3]
    linears = [n for n in graph.nodes if n.target in LINEAR and rank(n) in (2, 3)]
    for node in reversed(linears[-_LAST:]) if pictures else ():
        if is_data_dependent(shape(node)):
            continue
        *_, rows, width = hints(shape(node))
        start = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None].expand(
            *hints(shape(node))[:-2], rows, width
        )
        held = dict(_carried(graph, {node: start})).get(pictures[0])
        tokens = held.long().unique() if isinstance(held, Tensor) else torch.empty(0, device="cpu")
        if not _is_run(tokens) or tokens[0] < 0 or not fits(len(tokens)):
            continue
        first = _first_places(held, rows)[tokens]
        if sizes := _sizes(shape(pictures[0]), first, raster):
            return Told(sizes, node, _side(tokens, rows))
    return None


def _first_places(held: Tensor, rows: int) -> Tensor:
    """The first place in `held` of each of the numbers below `rows`."""
    values, first = held.flatten().long(), torch.full((rows,), NOWHERE, device="cpu")
    return first.scatter_reduce(0, values, torch.arange(len(values), device="cpu"), "amin", include_self=False)


def _is_run(numbers: Tensor) -> bool:
    return len(numbers) > 1 and int(numbers[-1] - numbers[0]) + 1 == len(numbers)


def _side(inside: Tensor, rows: int) -> Literal["first", "last"] | None:
    """Where other tokens are in a sequence of `rows`, of which those `inside` (a run) are the picture's."""
    before, after = int(inside[0]) > 0, int(inside[-1]) < rows - 1
    return None if before == after else "first" if before else "last"


def positions(graph: fx.Graph, moving: Set[fx.Node], fits: Callable[[int], bool]) -> Told | None:
    """The grid of positions (of a rotary embedding, say) that are laid out as one and then flattened to a sequence.

    `moving`: what depends on the inputs of a call; positions do not.
    """
    for node in graph.nodes:
        if node.target not in _FOLDS or node in moving or not isinstance(node.args[0], fx.Node):
            continue
        for sizes in _merged(shape(node.args[0]), shape(node)):
            if fits(prod(hints(sizes))):
                return Told(sizes, node, None)
    return None


def _merged(before: Sequence[Size], after: Sequence[Size]) -> Iterator[tuple[Size, Size, Size]]:
    """(t, h, w) of the neighbouring dimensions that become one; of two, h and w."""
    place = 0
    for size in hints(after):
        start, count = place, 1
        while place < len(before) and count < size:
            count *= hint(before[place])
            place += 1
        if count != size:
            return
        place += size == 1 and place < len(before) and hint(before[place]) == 1
        axes = [n for n in before[start:place] if hint(n) > 1]
        if 2 <= len(axes) <= 3:
            t, h, w = [1] * (3 - len(axes)) + axes
            yield t, h, w


def _sizes(picture: Sequence[Size], places: Tensor, raster: Raster) -> tuple[Size, Size, Size] | None:
    """(t, h, w) of `places` [N] in a `picture`: how often its sizes, that may be symbolic, hold those of a patch."""
    at = torch.stack(torch.unravel_index(places, hints(picture)), 1)
    moving = [d for d in range(len(picture)) if at[:, d].unique().numel() > 1]
    if len(moving) < 2 or (grid := raster(at)) is None:
        return None
    found: list[Size] = [1] * (3 - len(moving))
    for dim, count in zip(moving, grid[-len(moving) :], strict=True):
        patch = -(-hint(picture[dim]) // count)
        found.append(count if isinstance(picture[dim], int) else (picture[dim] + patch - 1) // patch)
    t, h, w = found
    return (t, h, w) if hints(found) == grid else None


def _carried(graph: fx.Graph, start: Mapping[fx.Node, Tensor]) -> Iterator[tuple[fx.Node, Any]]:
    """Nodes behind `start`, in order, with the places of their values as far as these can be told."""
    held: dict[fx.Node, Any] = dict(start)
    copies: set[int] = set()  # addresses
    spent = 0  # bytes
    for node in graph.nodes:
        if spent > _MOST_BYTES:
            return
        if node.op != "call_function" or node in held or not any(n in held for n in node.all_input_nodes):
            continue
        try:
            value = _carry(node, held)
        except (RuntimeError, TypeError, IndexError, KeyError):  # not told: order is then as it comes
            continue
        if isinstance(value, Tensor) and (memory := value.untyped_storage()).data_ptr() not in copies:
            copies.add(memory.data_ptr())
            spent += memory.nbytes()
        if value is not None:
            held[node] = value
            yield node, value


def _carry(node: fx.Node, held: Mapping[fx.Node, Any]) -> Any:
    if node.target in _PADS:
        given = arguments(node)
        return torch.constant_pad_nd(held[given["self"]], [_known(n) for n in given["pad"]], NOWHERE)
    if node.target is aten.einsum.default and len(node.args[1]) > 1:  # pyright: ignore[reportArgumentType]
        return None  # a product, not a layout
    if node.target in _LAYOUTS:
        if node.target not in _VIEWS and prod(hints(shape(node))) > _MOST:
            if node.target not in _FOLDS:
                return None
            return held[node.args[0]].view(hints(shape(node)))  # pyright: ignore[reportArgumentType]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: held[n] if n in held else _other(n))
        return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    if node.target in LINEAR:
        source = held[node.args[0]]  # pyright: ignore[reportArgumentType]
        return source[..., :1].expand(hints(shape(node)))
    if node.target in PROJECTIONS:
        return _convolved(node, held[node.args[0]])  # pyright: ignore[reportArgumentType]
    if not (node.target in _ROW_BY_ROW or is_pointwise(node)):
        return None
    sizes = hints(shape(node))
    return next((held[n] for n in node.all_input_nodes if n in held and _shape(held[n]) == sizes), None)


def _convolved(node: fx.Node, source: Tensor) -> Tensor:
    """The middle of the window behind each value."""
    given, sizes = arguments(node), hints(shape(node))
    kernel = hints(shape(given["weight"]))[2:]
    source = source[:, :1]
    for axis, width in enumerate(kernel):
        step, pad = (given[name][axis % len(given[name])] for name in ("stride", "padding"))
        index = torch.arange(sizes[2 + axis], device="cpu") * step - pad + (width - 1) // 2
        source = source.index_select(2 + axis, index.clamp(0, source.shape[2 + axis] - 1))
    return source.expand(sizes)


def _other(node: fx.Node) -> Any:
    """What an argument that comes from elsewhere stands for: a size, or a tensor that has no place."""
    if isinstance(node.meta.get("val"), Tensor):
        return torch.full((), float(NOWHERE), dtype=torch.float64, device="cpu").expand(hints(shape(node)))
    return _known(node)


def _known(size: Any) -> int:
    return hint(size.meta["val"] if isinstance(size, fx.Node) else size)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
