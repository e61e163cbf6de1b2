"""The grid of latent patches behind a sequence, and where text stands in it.

Found from the patchifying convolution, from a position-id input, or from where in the latents each token comes from. A wrong
or missing grid costs quality (rows of a group are then less alike), never correctness, since order is a property of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from chipmunk_fx.config import TokensConfig
from chipmunk_fx.errors import ConfigError
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.places import Grid, Told, entering, leaving, positions
from chipmunk_fx.graph.sizes import Size, evaluate, hint, is_data_dependent
from chipmunk_fx.graph.walk import VIEWS, ancestors, behind, placeholders, rank, shape

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
Side = Literal["first", "last"]
FRAMES = 4  # planes of ids that make a video; fewer, or planes more than 1 apart, are pictures of their own


@dataclass(frozen=True)
class Layout:
    """One sequence: image tokens of one grid or of several, each in raster order, with `text` tokens on one side."""

    grids: tuple[Grid, ...]
    side: Side | None
    text: int

    @property
    def image(self) -> int:
        return sum(map(prod, self.grids))


@dataclass(frozen=True)
class Geometry:
    """How to find a call's grids: `sizes` (possibly symbolic) of one or `ids`, an input that lists positions. `compiled`: those
    of the compiling call."""

    sizes: tuple[Size, Size, Size] | None
    ids: int | None
    side: Side | None
    text: int | None  # given by the user
    source: str
    compiled: tuple[Grid, ...] = ()

    def grids(self, known: dict[Any, int], values: Sequence[Any]) -> tuple[Grid, ...]:
        """Those of the pictures in a call's sequence, in order; empty where they are not known. Reads ids off the device."""
        if self.sizes is not None:
            t, h, w = evaluate(self.sizes, known)
            return ((t, h, w),)
        return () if self.ids is None else grids_of_ids(values[self.ids])

    def layout(self, rows: int, grids: tuple[Grid, ...]) -> Layout | None:
        """The layout of a sequence of `rows` tokens, or None where the grids do not explain its length."""
        text = rows - sum(map(prod, grids))
        if not grids or text < 0 or (text > 0 and (self.side is None or self.text not in (None, text))):
            return None
        return Layout(grids, self.side if text else None, text)


def sequence_lengths(candidates: Sequence[Candidate]) -> list[Size]:
    """Of the sequences that attend or, where none is known to, of those that MLPs read."""
    operands = [c.operands for c in candidates if c.operands is not None]
    attending = [o.q.shape[2] for o in operands if isinstance(o, AttentionOperands)]
    streams = [o.x for o in operands if isinstance(o, MlpOperands) and rank(o.x) == 3 and not o.channels_first]
    return attending or [shape(x)[1] for x in streams]


def find_geometry(
    capture: Capture, roles: Roles, tokens: TokensConfig, rows: Sequence[Size], real: Sequence[Any]
) -> Geometry:
    """Geometry for the sequences of length `rows`. `real` are the compiling call's inputs.

    Raises `ConfigError` where the user's grid explains none of a whole model's sequences; a piece of a model (no timestep)
    may hold other towers than the one that the grid is meant for.
    """
    lengths = sorted({hint(r) for r in rows if not is_data_dependent([r])}, reverse=True)
    open_ended = any(is_data_dependent([r]) for r in rows)

    def explains(image: int) -> bool:
        return image > 1 and (open_ended or any(length >= image for length in lengths))

    side: Side | None = None
    text: int | None = None
    if tokens.text != "auto":
        side, text = tokens.text
    if tokens.grid != "auto":
        t, h, w = tokens.grid
        side = side or _side(capture, roles, t * h * w, lengths)
        known = {t * h * w, t * h * w + (text or 0)}
        fits = bool(known & set(lengths)) or (text is None and side is not None)
        if fits or not lengths:
            return Geometry((t, h, w), None, side, text, "option tokens.grid", ((t, h, w),))
        if roles.timed:
            plus = f" (+ {text} text tokens)" if text else ""
            raise ConfigError.invalid(
                "tokens.grid",
                tokens.grid,
                f"t*h*w{plus} must be the length of an attention site; here t*h*w = {t * h * w}, lengths are {lengths}",
            )
    for sizes, source in _convolution_grids(capture, roles):
        image = prod(grid := _seen(sizes))
        if explains(image):
            return Geometry(sizes, None, side or _side(capture, roles, image, lengths), text, source, (grid,))
    for index in roles.ids:
        grids = grids_of_ids(real[index])
        image = sum(map(prod, grids))
        if explains(image):
            found = side or _side(capture, roles, image, lengths)
            return Geometry(None, index, found, text, f"position ids {capture.inputs[index].name}", grids)
    found, source = _told_by_layout(capture, roles, lengths, explains)
    if found:
        image = prod(grid := _seen(found.sizes))
        side = side or found.side or _side(capture, roles, image, lengths)
        return Geometry(found.sizes, None, side, text, source, (grid,))
    return Geometry(None, None, side, text, "unknown: raster order")


def _seen(sizes: tuple[Size, Size, Size]) -> Grid:
    """In the compiling call."""
    t, h, w = map(hint, sizes)
    return t, h, w


def _told_by_layout(
    capture: Capture, roles: Roles, lengths: Sequence[int], explains: Callable[[int], bool]
) -> tuple[Told | None, str]:
    """The grid by which latents are cut to tokens; else tokens make the result; else positions are laid out."""
    graph = capture.module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if roles.latents is not None and (found := entering(graph, inputs[roles.latents], explains, _raster)):
        return found, f"patches of {capture.inputs[roles.latents].name} in {found.node.name}"
    if found := leaving(graph, explains, _raster):
        return found, f"pixels of {found.node.name}"

    def alone(image: int) -> bool:
        """Not one of several pictures, as far as lengths tell."""
        return explains(image) and (image in lengths or _side(capture, roles, image, lengths) is not None)

    given = [n for n, entry in zip(inputs, capture.inputs, strict=True) if entry.is_tensor and not entry.is_parameter]
    found = positions(graph, behind(graph, given), alone)
    return found, f"positions in {found.node.name}" if found else ""


def grids_of_ids(ids: Any) -> tuple[Grid, ...]:
    """The grids that position ids [..., N, 2 to 4] enumerate in raster order, one after the other; empty where they do not.

    A picture ends where the first coordinate changes (FLUX Kontext, FLUX.2), unless it counts the frames of a video, and
    where the ids start anew. Reads the device.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2 or not 2 <= ids.shape[-1] <= 4 or ids.numel() == 0:
        return ()
    flat = ids.reshape(-1, ids.shape[-2], ids.shape[-1])[0].to("cpu", torch.float64)
    whole = _raster(flat)
    if whole is not None and (whole[0] == 1 or _is_video(flat[:, 0])):
        return (whole,)
    parts = flat.tensor_split(_starts(flat))
    found = [_raster(part) for part in parts]
    while found and len(parts[len(found) - 1]) == 1:  # of text, each token is by itself
        found.pop()
    first = next((i for i, part in enumerate(parts) if len(part) > 1), len(found))
    grids = tuple(grid for grid in found[first:] if grid is not None)
    return grids if len(grids) == len(found[first:]) else ()


def _is_video(times: torch.Tensor) -> bool:
    planes = times.unique()
    return len(planes) >= FRAMES and bool(planes.diff().max() <= 1)


def _starts(ids: torch.Tensor) -> torch.Tensor:
    """Where a picture begins behind another: rows whose first coordinate differs, or that stand before in raster order."""
    moves = ids.diff(dim=0)
    leading = moves.ne(0).int().argmax(1, keepdim=True)  # the first coordinate that moves tells the order
    anew = moves.gather(1, leading).squeeze(1) <= 0
    if ids.shape[1] > 2:  # of two coordinates, the first counts rows
        anew |= moves[:, 0] != 0
    return anew.nonzero().squeeze(1) + 1


def _raster(ids: torch.Tensor) -> Grid | None:
    """The grid that ids [N, 2 to 4] enumerate; a single place is none."""
    # Positions may be strided or centred: what counts is their rank along each axis.
    axes = [column.unique(return_inverse=True) for column in ids.unbind(1)]
    moving = [(len(values), ranks) for values, ranks in axes if len(values) > 1]
    if not 1 <= len(moving) <= 3:
        return None
    sizes = [size for size, _ in moving]
    index = torch.zeros_like(moving[0][1])
    for size, ranks in moving:
        index = index * size + ranks
    if len(index) != prod(sizes) or not torch.equal(index, torch.arange(len(index), device=index.device)):
        return None
    t, h, w = [1] * (3 - len(sizes)) + sizes
    return t, h, w


def _convolution_grids(capture: Capture, roles: Roles) -> list[tuple[tuple[Size, Size, Size], str]]:
    """Grids of convolutions that patchify the latents: (B,C,h,w), (B*t,C,h,w) or (B,C,t,h,w)."""
    nodes = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    latents = nodes[roles.latents] if roles.latents is not None else None
    grids = []
    for node in capture.module.graph.nodes:
        if node.target in _CONVOLUTIONS and latents in _near(node.args[0]):
            sizes = shape(node)
            if len(sizes) == 5:
                grids.append(((sizes[2], sizes[3], sizes[4]), f"convolution {node.name}"))
            elif len(sizes) == 4:
                batch = shape(latents)[0] if latents is not None else 1
                frames = 1 if hint(sizes[0]) == hint(batch) else sizes[0] // batch
                grids.append(((frames, sizes[2], sizes[3]), f"convolution {node.name}"))
    return grids


def _near(value: fx.Node) -> list[fx.Node]:
    """Inputs behind `value` through layout and joining ops only."""
    way = (*VIEWS, aten.cat.default, aten.stack.default, aten.slice.Tensor, aten.select.int, aten.pad.default)
    return [n for n in ancestors(value, lambda n: n.target not in way) if n.op == "placeholder"]


def _side(capture: Capture, roles: Roles, image: int, lengths: Sequence[int]) -> Side | None:
    """Which side the text is on: the first two-part concatenation [text, image] or [image, text] over tokens."""
    nodes = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    latents = nodes[roles.latents] if roles.latents is not None else None
    for node in capture.module.graph.nodes:
        if node.target is not aten.cat.default or len(node.args[0]) != 2:
            continue
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
        if hint(shape(node)[dim]) not in lengths or dim == len(shape(node)) - 1:
            continue
        sizes = [hint(shape(part)[dim]) for part in node.args[0]]
        fits = [size == image for size in sizes]
        if all(fits):  # equal lengths: text does not depend on the latents before the first joint attention
            fits = [latents in placeholders(part) for part in node.args[0]]
        if sum(fits) == 1:
            return "last" if fits[0] else "first"
    return None
