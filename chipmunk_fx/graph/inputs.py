"""What the graph's inputs mean: the timestep, the latents, the text, the position ids. Found by structure, names break ties."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from chipmunk_fx.graph.calls import dtype
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import (
    LINEAR,
    NORMS,
    PROJECTIONS,
    VIEWS,
    ancestors,
    is_pointwise,
    placeholders,
    rank,
    reaches,
    shape,
    strip,
)

aten = torch.ops.aten

_WAVES = (aten.sin.default, aten.cos.default)
# From a sinusoid to its projection: joined, laid out, cast, normed. A product with q or k (rotary embedding) is not on this way.
_EMBEDDING = (
    *(*VIEWS, aten.cat.default, aten.stack.default, aten.slice.Tensor, aten.select.int, aten.mul.Tensor),
    *(aten.repeat.default, aten.repeat_interleave.self_int),
    *NORMS,
)
_SCALED = (*VIEWS, aten.mul.Tensor)
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_JOINS = (aten.cat.default, aten.stack.default, aten.pad.default, aten.constant_pad_nd.default)
_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default)
_TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level", "c_noise", "log_snr", "logsnr", "lam")
_NOT_TIME = ("guidance", "size", "meta", "ratio", "resolution", "fps")
_LATENT_NAMES = ("hidden_states", "x", "latents", "sample", "img", "latent", "z")


@dataclass(frozen=True)
class Constant:
    name: str
    value: float

    def __str__(self) -> str:
        return (
            f"the timestep, {self.name}, is a Python number ({self.value:g}) and so a constant of the graph: other values "
            "compile a second graph, or one each (with dynamic=False, and floats that Inductor makes no tensors of) up to "
            "Dynamo's recompile_limit; as a tensor it needs one graph for all"
        )


@dataclass(frozen=True)
class Roles:
    """Positions among the graph's inputs. `text` lists the conditioning by which branches are told apart, `rest` what is left:
    masks, strengths, numbers.

    Where the latents are not known, no input is taken for text: it could be the latents, new at every call.
    `constant`: the timestep, where it is a number that this graph was made for. `beside`: of a list of latents, all others.
    `doubtful`: inputs that may be the timestep as well as the one that stands for it, where no name tells.
    """

    timestep: int | None
    latents: int | None
    text: tuple[int, ...]
    ids: tuple[int, ...]
    constant: Constant | None = None
    rest: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    doubtful: tuple[int, ...] = ()

    @property
    def timed(self) -> bool:
        """Whether the timestep of a call is known; it is not in a piece of a model."""
        return self.timestep is not None or self.constant is not None


def classify(capture: Capture) -> Roles:
    nodes = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    free = [i for i, entry in enumerate(capture.inputs) if entry.is_tensor and not entry.is_parameter]
    names = {i: _last_word(capture.inputs[i].name) for i in free}
    embeds, waved, rotary = _sinusoids(capture.module)
    told = ((n, _last_word(entry.name)) for n, entry in zip(nodes, capture.inputs, strict=True) if n in waved)
    # A stream of tokens is no time.
    timed = {n for n, name in told if rank(n) <= 2 or name in _TIME_NAMES or _is_one_a_sample(n)}
    times = [i for i in free if nodes[i] in timed] or [i for i in free if _is_named_time(nodes[i], names[i])]
    numbers = {i: _last_word(entry.name) for i, entry in enumerate(capture.inputs) if not entry.is_tensor}
    times = times or [i for i in numbers if nodes[i] in timed and numbers[i] in _TIME_NAMES]  # not: sizes
    timestep = _prefer(times, names | numbers, _TIME_NAMES, avoid=_NOT_TIME)
    ids = tuple(i for i in free if nodes[i] in rotary and nodes[i] not in timed)
    streams = [i for i in free if i not in times and i not in ids]
    latents = _latents(capture, streams, names)
    beside = () if latents is None else _beside(capture, nodes, latents, streams)
    # Scalars are settings that Dynamo made tensors of (an epsilon), not text.
    others = [i for i in streams if i not in (latents, *beside) and rank(nodes[i]) > 0]
    constant = _constant(capture, embeds) if timestep is None else None
    text = () if latents is None else _text(capture, others, nodes, latents)
    doubtful = _doubtful(timestep, times, names | numbers)
    taken = {timestep, latents, *beside, *text, *ids, *doubtful}
    rest = tuple(i for i, entry in enumerate(capture.inputs) if not entry.is_parameter and i not in taken)
    return Roles(timestep, latents, text, ids, constant, rest, beside, doubtful)


def _doubtful(timestep: int | None, times: Sequence[int], names: dict[int, str]) -> tuple[int, ...]:
    """Of `times`, others that may be the time: their names say no more of it than that of `timestep` does."""
    if timestep is None or any(_word(word)(names[timestep]) for word in _TIME_NAMES):
        return ()
    return tuple(i for i in times if i != timestep and not any(word in names[i] for word in _NOT_TIME))


def _beside(capture: Capture, nodes: Sequence[fx.Node], latents: int, free: Sequence[int]) -> tuple[int, ...]:
    """What stands in one list with the latents and is projected by the same weights.

    A text among the `*args` of a model stands in one tuple with them, too, but has weights of its own.
    """
    holders = [_list_of(entry.name) for entry in capture.inputs]
    listed = [i for i in free if i != latents and holders[latents] and holders[i] == holders[latents]]
    if not listed:
        return ()
    projected = [n for n in capture.module.graph.nodes if n.target in PROJECTIONS]
    entered = [(strip(n.args[1]), ancestors(n, lambda other: other.target in PROJECTIONS)) for n in projected]
    own = {weight for weight, behind in entered if nodes[latents] in behind}
    alike = {node for weight, behind in entered if weight in own for node in behind}
    return tuple(i for i in listed if nodes[i] in alike)


def _text(capture: Capture, rest: Sequence[int], nodes: Sequence[fx.Node], latents: int) -> tuple[int, ...]:
    """Of the `rest` of the inputs, those by which branches are told apart: texts, and labels or pooled texts beside them.

    What is added to the tokens as it is (the residuals of a ControlNet) is made anew at every call.
    """

    def is_text(index: int) -> bool:
        return rank(nodes[index]) >= 3 and capture.inputs[index].value.is_floating_point()

    lasting = [i for i in rest if not (is_text(i) and _is_residual(nodes[i], nodes[latents]))]
    texts = [i for i in lasting if is_text(i)]
    others = [i for i in lasting if i not in texts]
    return (*texts, *(i for i in others if not texts or _is_looked_up(nodes[i]) or _is_projected(nodes[i])))


def _is_looked_up(node: fx.Node) -> bool:
    """Whether the input, or what is reckoned of it, says what to take of a table; a mask says what to keep."""

    def takes(source: fx.Node, user: fx.Node) -> bool:
        return user.target in _LOOKUPS and user.args[0] is not source and dtype(source) != torch.bool

    def reckons(source: fx.Node, user: fx.Node) -> bool:
        return is_pointwise(user) and dtype(user) != torch.bool

    return reaches(node, VIEWS, takes, also=reckons)


def _is_projected(node: fx.Node) -> bool:
    """Whether the input, one vector a sample or the text of one sample, goes to a linear: as it is, joined to others, or by
    norms and activations."""

    def projects(source: fx.Node, user: fx.Node) -> bool:
        return user.target in LINEAR and user.args[0] is source

    def keeps(source: fx.Node, user: fx.Node) -> bool:
        # What is spread over something larger (a mask, a strength) is no vector of its own.
        return is_pointwise(user) and hints(shape(user)) == hints(shape(source))

    return rank(node) == 2 and reaches(node, (*VIEWS, *_JOINS, *NORMS), projects, also=keeps)


def _is_residual(node: fx.Node, latents: fx.Node) -> bool:
    """Whether all that is done with the input is to add it to tokens that the latents were projected to."""
    passed, ends = [node], []
    for source in passed:  # which grows
        for user in source.users:
            (passed if user.target in _SCALED else ends).append(user)

    def is_stream(other: fx.Node, user: fx.Node) -> bool:
        behind = ancestors(other, lambda _: False)
        alike = other not in passed and hints(shape(other)) == hints(shape(user))
        return alike and latents in behind and any(n.target in PROJECTIONS for n in behind)

    return bool(ends) and all(
        user.target in _SUMS and any(is_stream(other, user) for other in user.all_input_nodes) for user in ends
    )


def _constant(capture: Capture, embeds: bool) -> Constant | None:
    """The time of a graph of which no input is one. Without a sinusoid it is no whole number, which could be a size."""
    numbers = {n: v for n, v in capture.numbers.items() if n in _TIME_NAMES and (embeds or isinstance(v, float))}
    name = min(numbers, key=_TIME_NAMES.index, default=None)
    return None if name is None else Constant(name, numbers[name])


def _sinusoids(module: fx.GraphModule) -> tuple[bool, set[fx.Node], set[fx.Node]]:
    """Whether a wave (sin or cos) reaches a linear; inputs behind such waves (times), and behind others (rotary)."""

    def into_linear(node: fx.Node, user: fx.Node) -> bool:
        return user.target in LINEAR and user.args[0] is node

    embeds = False
    waved: set[fx.Node] = set()
    rotary: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.target in _WAVES:
            # A sequence that reached the wave through a projection is neither time nor position.
            sources = [p for p in ancestors(node, lambda n: n.target in PROJECTIONS) if p.op == "placeholder"]
            alone = bool(sources) and all(map(_is_one_a_sample, sources))
            # Of one value a sample the sinusoid may be a token among others, to all of which positions are added.
            if reaches(node, (*_EMBEDDING, *_SUMS) if alone else _EMBEDDING, into_linear):
                embeds = True
                waved.update(sources)
            else:
                rotary.update(sources)
        elif node.target in (aten.polar.default, aten.complex.default):
            rotary.update(placeholders(node))
    return embeds, waved, rotary


def _is_named_time(node: fx.Node, name: str) -> bool:
    """A time without a sinusoid: one value a sample, looked up in a table or projected. So are labels and strengths: the
    name must say it."""
    return name in _TIME_NAMES and _is_one_a_sample(node) and bool(node.users)


def _is_one_a_sample(node: fx.Node) -> bool:
    """Whether it is a tensor of one value for each sample of the batch; a number could be a size."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(size == 1 for size in value.shape[1:])


def _latents(capture: Capture, candidates: Sequence[int], names: dict[int, str]) -> int | None:
    """The input with the output's rank and sizes, but for the channels and a patch factor that all models restore.

    A piece of a model may return something else: a name that says it comes first.
    """
    output = next(n for n in reversed(capture.module.graph.nodes) if n.op == "output")
    results = [n for n in output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not results:
        return None
    wanted = hints(results[0].meta["val"].shape)

    def alike(index: int) -> bool:
        value = capture.inputs[index].value
        same = sum(a == b for a, b in zip(hints(value.shape), wanted, strict=False))
        return value.is_floating_point() and len(value.shape) == len(wanted) >= 2 and same >= len(wanted) - 1

    named = [i for i in candidates if names[i] in _LATENT_NAMES and len(capture.inputs[i].value.shape) >= 3]
    return _prefer([*named, *(i for i in candidates if alike(i))], names, _LATENT_NAMES)


def _prefer(
    candidates: Sequence[int], names: dict[int, str], wanted: Sequence[str], avoid: Sequence[str] = ()
) -> int | None:
    """The candidate with the best name: a listed one, one that holds a listed word, any other, an avoided one last."""

    def key(index: int) -> tuple[bool, bool, int, int]:
        name = names[index]
        place = next((i for i, w in enumerate(wanted) if _word(w)(name)), len(wanted))
        return any(a in name for a in avoid), name not in wanted, place, index

    return min(candidates, key=key, default=None)


def _last_word(name: str) -> str:
    """`x` of `batch.x`, and of `x.0`, the first of a list."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _list_of(name: str) -> str:
    """`x` of `x.0`; nothing where the input is not one of a list."""
    holder, _, place = name.rpartition(".")
    return holder if place.isdigit() else ""


def _word(word: str) -> Callable[[str], bool]:
    pattern = re.compile(rf"(^|_){re.escape(word)}(_|$)")
    return lambda name: pattern.search(name) is not None
