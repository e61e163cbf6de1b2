"""The region of blocks that a skipped step leaves out, and the residual streams that run through it.

A block adds to a stream: what leaves the last block is what entered the first one plus what all have added. So a step can
be skipped by adding again what was added last (step caching: "Chipmunk", arXiv 2506.03275, section on step caching).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.language import arguments
from chipmunk_fx.graph.match import Candidate, block_of
from chipmunk_fx.graph.sizes import hint, hints
from chipmunk_fx.graph.walk import VIEWS, behind, depending, mutated_between, shape, storage, written

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unsafe_split.Tensor)


@dataclass(frozen=True)
class Cut:
    """[start, stop) of a dimension, cut off the stream behind what is being looked at."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stream:
    """`stop`, which leaves the region, is `start`, which enters it, plus what the region adds."""

    start: fx.Node
    stop: fx.Node


@dataclass(frozen=True)
class Region:
    """All nodes of the blocks, and all streams that something after them reads."""

    nodes: frozenset[fx.Node]
    streams: tuple[Stream, ...]

    def __str__(self) -> str:
        return "; ".join(f"{s.start} to {s.stop}" for s in self.streams)


@dataclass(frozen=True)
class _Inside:
    """Of a graph the nodes of a region, what depends on the latents, and what depends on any input of a call."""

    graph: fx.Graph
    nodes: set[fx.Node]
    moving: Set[fx.Node]
    given: Set[fx.Node]


def find_region(capture: Capture, candidates: Sequence[Candidate], latents: fx.Node | None) -> Region | str:
    """The region of all blocks or, where that is none, of the longest stack; or why no step can be skipped."""
    if latents is None:
        return "the latents are not known"
    graph = capture.module.graph
    moving = depending(latents)  # what only conditions (time embeddings) may be shared with what comes after
    inputs = zip((n for n in graph.nodes if n.op == "placeholder"), capture.inputs, strict=True)
    own = {n for n, entry in inputs if entry.is_tensor and not entry.is_parameter}
    given = behind(graph, own) | own
    blocks = _blocks(candidates, moving)
    if not blocks:
        return "no numbered container of modules (blocks.0, ...) holds an attention or an MLP over the latents"
    whole = _region(graph, blocks, moving, given)
    stacks = Counter(block.rpartition(".")[0] for block in blocks)
    if isinstance(whole, Region) or len(stacks) == 1:
        return whole
    (longest, _), *_ = stacks.most_common(1)  # refiners before it may work on other streams
    part = _region(graph, {block for block in blocks if block.rpartition(".")[0] == longest}, moving, given)
    return part if isinstance(part, Region) else whole


def _blocks(candidates: Sequence[Candidate], moving: Set[fx.Node]) -> set[str]:
    """Those with an attention; in a model that has none that is known (linear attention), the most alike with an MLP."""
    found = [c for c in candidates if c.block and c.anchor in moving]
    attending = {c.block for c in found if c.kind == "attention" and c.block}
    if attending:
        return attending
    thinking = {c.block for c in found if c.operands is not None and c.block}
    stacks = Counter(block.rpartition(".")[0] for block in thinking)
    longest = next((stack for stack, _ in stacks.most_common(1)), None)  # not an embedder's or a head's
    return {block for block in thinking if block.rpartition(".")[0] == longest}


def _region(graph: fx.Graph, blocks: Set[str], moving: Set[fx.Node], given: Set[fx.Node]) -> Region | str:
    nodes = _closed(graph, {n for n in moving if n.op == "call_function" and block_of(n) in blocks})
    nodes |= _filled(graph, nodes)
    inside = _Inside(graph, nodes, moving, given)
    after = behind(graph, nodes)
    outside = {storage(n): n for n in graph.nodes if n not in nodes and n not in after}
    for node in nodes:
        if outer := next((outside[s] for n in written(node) if (s := storage(n)) in outside), None):
            return f"{node} in the blocks writes in place to {outer} outside of them"
    streams = []
    entering = moving & ({n for node in nodes for n in node.all_input_nodes} - nodes)
    leaving = [n for n in graph.nodes if n in nodes and _further(n, nodes)]
    while leaving:
        node = leaving.pop(0)
        if not (further := _further(node, nodes)):
            continue
        start = _follow(node, (), nodes, moving, set())
        if start is None and all(_is_sum(user, nodes, entering) for user in further):
            nodes.update(further)  # what a block makes is added to a stream behind it
            leaving += further
            continue
        stream = _stream(start, node, inside)
        if isinstance(stream, Stream):
            streams.append(stream)
        elif all(map(_is_part, further)):
            # joint streams are cut, and layouts restored, behind the last block
            nodes.update(further)
            leaving += further
        else:
            return stream
    streams = [stream for stream in streams if _further(stream.stop, nodes)]
    return Region(frozenset(nodes), tuple(streams)) if streams else "nothing after the blocks reads what they add to"


def dead_after_skip(module: fx.GraphModule, region: Region) -> set[fx.Node]:
    """The nodes that a skipped step does not run: those of the region, and what only they read."""
    dead = set(region.nodes)
    needed = {stream.start for stream in region.streams}
    for node in reversed(module.graph.nodes):
        pure = node.op == "call_function" and not written(node)
        if pure and node not in needed and all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _closed(graph: fx.Graph, blocks: set[fx.Node]) -> set[fx.Node]:
    """The nodes of the blocks, whatever lies on a way from one to another, and in-place writes to what is theirs."""
    after, before = behind(graph, blocks), set()
    for node in reversed(graph.nodes):
        if any(n in blocks or n in before for n in node.users):
            before.add(node)
    closed = blocks | (after & before)
    return closed | {
        n for n in after if n.op == "call_function" and written(n) and not n.users and set(written(n)) <= closed
    }


def _filled(graph: fx.Graph, nodes: Set[fx.Node]) -> set[fx.Node]:
    """What is made (zeros, say) for the nodes to write to in place, and read by nobody else."""
    targets, found = {storage(n) for node in nodes for n in written(node)}, set()
    for node in reversed(graph.nodes):
        own = node.op == "call_function" and node not in nodes and storage(node) in targets
        if own and node.users and all(user in nodes or user in found for user in node.users):
            found.add(node)
    return found


def _further(node: fx.Node, nodes: Set[fx.Node]) -> list[fx.Node]:
    """What outside of the nodes reads one of them."""
    return [user for user in node.users if user not in nodes]


def _is_sum(node: fx.Node, nodes: Set[fx.Node], entering: Set[fx.Node]) -> bool:
    """Whether the node adds up, or scales, what the nodes made and nothing else, or adds it to what enters them."""
    operands = nodes | entering if node.target is aten.add.Tensor else nodes
    return node.target in _SUMS and operands >= set(node.all_input_nodes)


def _is_part(node: fx.Node) -> bool:
    return node.target in (*VIEWS, *_SPLITS, aten.slice.Tensor, operator.getitem)


def _stream(start: fx.Node | None, stop: fx.Node, inside: _Inside) -> Stream | str:
    """`start`: what enters the region, depends on the latents and leads to `stop`, if there is such a thing."""
    value = stop.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return f"{stop} leaves the blocks and is no tensor"
    if start is None:
        # the stream of another input (sound beside a picture), or one that a norm ends
        other = _follow(stop, (), inside.nodes, inside.given, set()), _only_entry(stop, inside.nodes, inside.moving)
        found = {n for n in other if n is not None}
        start = found.pop() if len(found) == 1 else None
    if start is None:
        return f"{stop} leaves the blocks and no stream {hints(value.shape)} that enters them leads to it"
    if hints(shape(start)) != hints(value.shape):
        return f"{stop} leaves the blocks with {hints(value.shape)}, {start} enters with {hints(shape(start))}"
    if writer := mutated_between(start, stop, [start]):
        return f"{writer} writes in place to the stream that {start} begins"
    return Stream(start, stop)


def _follow(
    node: fx.Node, cuts: tuple[Cut, ...], nodes: Set[fx.Node], moving: Set[fx.Node], seen: set
) -> fx.Node | None:
    """Back along additions, casts and layouts to a node that enters the region."""
    if (node, cuts) in seen:
        return None
    seen.add((node, cuts))
    if node not in nodes:
        return node if not cuts and node in moving else None
    for source, kept in _sources(node, cuts):
        if found := _follow(source, kept, nodes, moving, seen):
            return found
    return None


def _sources(node: fx.Node, cuts: tuple[Cut, ...]) -> list[tuple[fx.Node, tuple[Cut, ...]]]:
    """What a stream may have been before `node`."""
    if node.target is operator.getitem and node.args[0].target in _SPLITS:  # pyright: ignore
        split, index = node.args
        source, dim = split.args[0], arguments(split)["dim"] % len(shape(split.args[0]))  # pyright: ignore
        sizes = [hint(part.shape[dim]) for part in split.meta["val"]]  # pyright: ignore
        start = sum(sizes[:index])  # pyright: ignore
        return [(source, (Cut(dim, start, start + sizes[index]), *cuts))]  # pyright: ignore
    given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target is aten.add.Tensor:
        operands = [given["self"], given["other"]]
        return [(n, cuts) for n in operands if isinstance(n, fx.Node) and hints(shape(n)) == hints(shape(node))]
    if node.target is aten.slice.Tensor and given["step"] == 1:
        source, dim = given["self"], given["dim"] % len(shape(node))
        length = hint(shape(source)[dim])
        start = (
            hint(given["start"] or 0) if not isinstance(given["start"], fx.Node) else hint(given["start"].meta["val"])
        )
        start = start + length if start < 0 else start
        return [(source, (Cut(dim, start, start + hint(shape(node)[dim])), *cuts))]
    if node.target is aten.cat.default and cuts:
        return _part(given, cuts)
    if node.target in VIEWS and not cuts:
        return [(node.all_input_nodes[0], cuts)]
    casts = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default)
    return [(given["self"], cuts)] if node.target in casts else []


def _part(given: dict, cuts: tuple[Cut, ...]) -> list[tuple[fx.Node, tuple[Cut, ...]]]:
    """The part of a concatenation that the first cut is."""
    first, *rest = cuts
    start = 0
    for part in given["tensors"]:
        dim = given["dim"] % len(shape(part))
        stop = start + hint(shape(part)[dim])
        if first.dim == dim and (first.start, first.stop) == (start, stop):
            return [(part, tuple(rest))]
        start = stop
    return []


def _only_entry(stop: fx.Node, nodes: Set[fx.Node], moving: Set[fx.Node]) -> fx.Node | None:
    """The one tensor of that size that enters the region and depends on the latents."""
    entries = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes)
    value = stop.meta["val"]
    alike = [
        n
        for n in entries
        if isinstance(v := n.meta.get("val"), torch.Tensor)
        and hints(v.shape) == hints(value.shape)
        and v.dtype == value.dtype
        and n in moving
    ]
    return alike[0] if len(alike) == 1 else None
