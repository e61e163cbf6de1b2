"""Read from a call's inputs what the timeline needs: timestep, text identity, shape, a sample of the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.log import logger
from chipmunk_fx.schedule.run import Observation

_SAMPLE = 96  # values of the latents that are compared from call to call
_TIMES = 64  # a batch of timesteps longer than this (one a token) is summed up
_ALIKE, _OTHER = 0.4, 0.5  # a share of values that are equal; a distance, relative to the larger, between texts
_KEPT = 1 << 16  # values at most of a tensor that are kept to be compared with those of a later call

GUIDED = (
    "two calls of a `generation` block brought the same tokens and another text to the first block: guidance calls the model "
    "more than once a step, of which its pieces see nothing else. Give schedule.branches, or enter "
    "chipmunk_fx.generation(model, key=..., branch=...) around each call"
)

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Sight:
    """What a call shows: what is `told` at once, and numbers that the device may have yet to compute.

    numbers: fp64 on the host, first the timesteps where `told` has none, so many of each input that may be it as `times` says,
    then the sample of the latents. arrived: recorded behind their transfer; None where they are there.
    """

    told: Observation
    numbers: torch.Tensor | None = None
    times: tuple[int, ...] = ()
    which: TimeInput | None = None
    arrived: torch.cuda.Event | None = None

    def whole(self) -> Observation:
        """Waits until the device has told the rest."""
        if self.numbers is None:
            return self.told
        if self.arrived is not None:
            self.arrived.synchronize()
        sizes = [*self.times, len(self.numbers) - sum(self.times)]
        *times, latents = (tuple(part.tolist()) for part in self.numbers.split(sizes))
        told = replace(self.told, latents=latents or None)
        return replace(told, timestep=self.which.read(times, told.latents)) if times and self.which else told


class TimeInput:
    """Which of several inputs is the timestep: the first, until one of them is seen to move, with other latents, before it does.

    Two branches of guidance may differ in one of them, too: their latents are the same.
    """

    def __init__(self) -> None:
        self._first: tuple[Sequence[Numbers], Numbers | None] | None = None
        self._chosen: int | None = None

    def read(self, times: Sequence[Numbers], latents: Numbers | None) -> Numbers:
        """Of the values of each, those of the timestep."""
        if self._first is None:
            self._first = times, latents
        before, latents_before = self._first
        if self._chosen is None and (latents is None or latents != latents_before):
            moved = (len(now) == len(old) and now != old for now, old in zip(times, before, strict=False))
            self._chosen = next((place for place, so in enumerate(moved) if so), None)
            if self._chosen:
                logger("runtime").info(
                    "the timestep is another input than the one taken for it at first, which did not move"
                )
        chosen = self._chosen or 0
        return times[chosen if chosen < len(times) else 0]  # another graph may have fewer


class Observer:
    """Remembers texts by object, so that their content is read once. One observer a session."""

    def __init__(self) -> None:
        self._texts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (version, fingerprint)
        self._time = TimeInput()

    def observe(self, roles: Roles, values: Sequence[Any], graph: Hashable = None) -> Sight:
        """Begins one device-to-host transfer for timestep and sample; reads each text that was not seen before.

        A piece of a model without a timestep is only counted: nothing is read from the device. graph: which one the call is of,
        where all else that it shows may be asked for; flags that are Python's make graphs of their own.
        """
        if not roles.timed:
            return Sight(Observation(shape=_piece_signature(roles, values)))
        times = [_numbers(roles.constant.value if roles.constant else values[roles.timestep])]  # pyright: ignore
        times += [_numbers(values[index]) for index in roles.doubtful]
        text = tuple(self._text(values[index]) for index in roles.text) or None
        latents = None if roles.latents is None else values[roles.latents]
        known_by = None if roles.constant else graph  # else each timestep has a graph
        rest = None if graph is None else self._rest(known_by, [values[i] for i in roles.rest])
        told = Observation(text=text, shape=None if latents is None else _signature(latents), rest=rest)
        parts = [] if latents is None else [_sample(latents)]
        if len(times) == 1 and times[0].device.type == "cpu":
            told = replace(told, timestep=tuple(times[0].tolist()))
        else:
            parts = [*times, *parts]
        return _transfer(told, parts, times, self._time) if parts else Sight(told)

    def _rest(self, graph: Hashable, values: Sequence[Any]) -> Callable[[], Hashable]:
        """Reads the content of tensors among `values` when it is called; what has changed by then is like nothing else."""
        numbers = tuple(value for value in values if not isinstance(value, torch.Tensor))
        tensors = [_held(value) for value in values if isinstance(value, torch.Tensor)]
        kept = [(tensor, version_of(tensor)) for tensor in tensors]

        def read() -> Hashable:
            told = tuple(self._text(t) if version_of(t) == version else object() for t, version in kept)
            return graph, numbers, told

        return read

    def _text(self, tensor: torch.Tensor) -> Hashable:
        version = version_of(tensor)
        known = self._texts.get(tensor)
        if known is not None and version is not None and known[0] == version:
            return known[1]
        print_ = fingerprint(tensor)
        self._texts[tensor] = (version, print_)
        return print_


def _transfer(
    told: Observation, parts: Sequence[torch.Tensor], times: Sequence[torch.Tensor], which: TimeInput
) -> Sight:
    """`parts`: the timesteps, where `told` has none, and a sample of the latents. Nothing that CUDA devices do is waited for."""
    device, sizes = parts[-1].device, tuple(map(len, times)) if told.timestep is None else ()
    numbers = torch.cat([part.to(device, torch.float64) for part in parts])
    if device.type != "cuda":
        return Sight(told, numbers.to("cpu"), sizes, which)
    # Said of every such tensor: torch.set_default_device may name another device.
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return Sight(told, host, sizes, which, arrived)


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of some of its values where it is large, or does not tell when it is written to."""
    if tensor.numel() <= _KEPT and not tensor.is_inference():
        return tensor
    return tensor.detach().reshape(-1)[:: -(-tensor.numel() // _KEPT) or 1].clone()


def version_of(tensor: torch.Tensor) -> int | None:
    """None for inference tensors, which count no changes."""
    return None if tensor.is_inference() else tensor._version


def fingerprint(tensor: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """(shape, 64-bit checksum of the bits); equal content on one device gives equal fingerprints."""
    flat = tensor.detach().contiguous()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = flat.element_size()
    bits = torch.view_as_real(flat).contiguous().view(torch.int32) if flat.is_complex() else flat.view(kinds[size])
    bits = bits.reshape(-1).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B97F4A7C1  # odd steps: positions count
    mixed = (bits + weights) * (weights ^ 0x5851F42D4C957F2D)
    return tuple(tensor.shape), int((mixed ^ (mixed >> 29)).sum())


def _numbers(value: Any) -> torch.Tensor:
    # Not as_tensor: it moves tensors to the device that torch.set_default_device names.
    times = (value if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")).detach().reshape(-1)
    if len(times) <= _TIMES:
        return times
    times = times.to(torch.float64)
    return torch.stack([times.sum(), times.amin(), times.amax()])


def _sample(latents: torch.Tensor) -> torch.Tensor:
    flat = latents.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    stride -= stride > 1 and stride % 2 == 0  # not always the same channel where channels are last
    return flat[: stride * _SAMPLE : stride]


def inputs_of(roles: Roles, values: Sequence[Any]) -> tuple[Numbers, ...]:
    """Some values of each sequence of tokens that a piece is given, for which the device is waited."""
    inputs = _inputs(roles, values)
    return tuple(tuple(_sample(x).tolist()) for x in inputs if x.dim() >= 3 and x.is_floating_point())


def are_branches(first: Sequence[Numbers], second: Sequence[Numbers]) -> bool:
    """Whether two calls are branches of one step: some tokens are the same, and the others wholly different, as texts are. From
    step to step texts are the same, and the others move little."""
    if [len(x) for x in first] != [len(x) for x in second]:
        return False
    pairs = [pair for x, y in zip(first, second, strict=True) for pair in zip(x, y, strict=True)]
    moved = [(a, b) for a, b in pairs if a != b]
    alike = sum(a == b != 0 for a, b in pairs)
    if not moved or alike < _ALIKE * len(pairs):
        return False
    size = max(math.hypot(*side) for side in zip(*moved, strict=True))
    return math.dist(*zip(*moved, strict=True)) > _OTHER * size


def _piece_signature(roles: Roles, values: Sequence[Any]) -> Hashable:
    tokens = _largest(roles, values)
    return None if tokens is None else _signature(tokens)


def _largest(roles: Roles, values: Sequence[Any]) -> torch.Tensor | None:
    """The largest input of a piece that is no parameter: the image's tokens."""
    return max(_inputs(roles, values), key=lambda tensor: tensor.numel(), default=None)


def _inputs(roles: Roles, values: Sequence[Any]) -> list[torch.Tensor]:
    return [values[i] for i in (roles.latents, *roles.text) if i is not None]


def _signature(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, str(tensor.device)
