"""What a call's inputs tell before the model runs: which keys are padding, and lengths that depend on the data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chipmunk_fx.graph.masks import Probe
from chipmunk_fx.runtime.observe import version_of
from chipmunk_fx.runtime.tables import Fixed

_KEPT = 8  # answers that are remembered: branches take turns
_NOTHING_ADDED = -9e3  # exp() of a score plus this (-1e4 in bf16 is -9984) is 0 beside that of any other


@dataclass(frozen=True)
class Padding:
    """`valid`: bool [B, M] on the device, `host` the same on the CPU. `span`: int64 [2] on the CPU, the first valid key and the
    one after the last if all between are valid for all of the batch, else -1 twice. `keys`: how many there are to choose from.
    """

    valid: torch.Tensor
    host: torch.Tensor
    span: torch.Tensor
    keys: int

    def fixed(self, always: torch.Tensor) -> Fixed:
        """Of the valid columns that groups always take. always: bool [1 or G, M] on any device."""
        taken = always.to("cpu").unsqueeze(0) & self.host.unsqueeze(1)
        return Fixed.of(taken.sum(-1))


@dataclass(frozen=True)
class Known:
    """`problem`: why the masks cannot be taken for key padding in this call."""

    paddings: tuple[Padding, ...] = ()
    lengths: Mapping[Any, int] = field(default_factory=dict)
    problem: str | None = None

    def same(self, other: Known) -> bool:
        """Whether the same keys are valid."""
        if self is other:
            return True
        pairs = zip(self.paddings, other.paddings, strict=False)
        return len(self.paddings) == len(other.paddings) and all(
            a.host.shape == b.host.shape and torch.equal(a.host, b.host) for a, b in pairs
        )


class Prober:
    """Runs a probe where its inputs are not those of one of the last calls. One prober a session and graph."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._answers: list[tuple[tuple[Stamp, ...], Known]] = []
        self._answered = True  # the last call was one whose inputs had been seen before

    def ask(self, values: Sequence[Any], again: bool = False) -> Known:
        """Reads the device once for inputs not seen before. again: for those of the last call, too."""
        if again and self._answered:
            self._answers = []
        inputs = [values[i] for i in self.probe.inputs]
        for stamps, known in self._answers:
            if all(stamp.fits(value) for stamp, value in zip(stamps, inputs, strict=True)):
                self._answered = True
                return known
        self._answered = False
        measured = self.probe.measured
        stamps = tuple(Stamp.make(values[i], i in measured) for i in self.probe.inputs)
        masks, lengths = self.probe(values)
        known = understand(masks, lengths)
        self._answers = [(stamps, known), *self._answers[: _KEPT - 1]]
        return known


def understand(masks: Sequence[torch.Tensor], lengths: Mapping[Any, int]) -> Known:
    """masks: [B, 1, 1, M], expanded from it, or [1, M]; boolean (true: attend) or added to the scores."""
    paddings, problem = [], None
    for mask in masks:
        line = mask[:, 0, 0] if mask.dim() == 4 else mask[:1]
        host = line.to("cpu")
        valid = host if host.dtype == torch.bool else host == 0
        if host.dtype != torch.bool and not bool((valid | (host <= _NOTHING_ADDED)).all()):
            problem = "the attention mask adds to scores, it does more than leave keys out"
        elif not bool(valid.any(1).all()):
            problem = "the attention mask leaves an entry of the batch without keys"
        paddings.append(_padding(line if line.dtype == torch.bool else line == 0, valid))
    return Known(tuple(paddings), lengths, problem)


def _padding(device: torch.Tensor, host: torch.Tensor) -> Padding:
    first, last = host.int().argmax(1), host.shape[1] - host.int().flip(1).argmax(1)
    start, stop = int(first[0]), int(last[0])
    run = torch.zeros(host.shape[1], dtype=torch.bool, device="cpu")
    run[start:stop] = True
    whole = torch.equal(host, run.expand_as(host))
    with torch.inference_mode(False):  # may be read outside of it later
        span = torch.tensor([start, stop] if whole else [-1, -1], device="cpu")
        return Padding(device.clone(), host.clone(), span, int(host.sum(1).max()))


@dataclass(frozen=True)
class Stamp:
    """What an input was. content: a copy of a tensor on the CPU, to whose memory others than PyTorch may write (numpy). Elsewhere
    `of` (weakly), its `version` (None: it has none, having been made in inference mode) and `address` tell."""

    told: Any
    content: torch.Tensor | None = None
    of: weakref.ref[torch.Tensor] | None = None
    version: int | None = None
    address: int = 0

    @classmethod
    def make(cls, value: Any, measured: bool) -> Stamp:
        """measured: only the shape counts."""
        if not isinstance(value, torch.Tensor):
            return cls(value)
        shape = tuple(value.shape)
        if measured:
            return cls(shape)
        if value.device.type == "cpu":
            with torch.inference_mode(False):  # may be read outside of it later
                return cls(shape, value.clone())
        return cls(shape, None, weakref.ref(value), version_of(value), value.data_ptr())

    def fits(self, value: Any) -> bool:
        """Whether `value` is what it was."""
        if not isinstance(value, torch.Tensor):
            return self.told == value
        if self.told != tuple(value.shape):
            return False
        if self.content is not None:
            return self.content.dtype == value.dtype and value.device.type == "cpu" and torch.equal(self.content, value)
        if self.of is None:
            return True
        same = self.of() is value and self.address == value.data_ptr()
        return same and self.version is not None and self.version == version_of(value)
