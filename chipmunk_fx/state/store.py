"""The tensors of one session's caches: allocated once, reused from generation to generation, counted where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.state.pinned import pinned
from chipmunk_fx.state.slots import Slot

Home = WeakIdKeyDictionary
"""Caches by Parameter and what tells its sites apart: dict[tuple, Cell]. They go with the parameter."""


@dataclass(frozen=True)
class Place:
    """Where a cache lies. A session on a CPU has a host side too, so that its copies can be tested."""

    device: torch.device
    on_host: bool = False

    @property
    def pinned(self) -> bool:
        return self.on_host and torch.cuda.is_available()


@dataclass(frozen=True)
class Cell:
    """What one site keeps, by slot name."""

    tensors: dict[str, torch.Tensor]
    place: Place

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def holds(self, slots: Sequence[Slot], place: Place) -> bool:
        tensors = self.tensors
        return self.place == place and all(
            s.name in tensors and tuple(tensors[s.name].shape) == s.shape and tensors[s.name].dtype == s.dtype
            for s in slots
        )


@dataclass(frozen=True)
class Account:
    """Bytes held on the device and in host memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Account) -> Account:
        return Account(self.device + other.device, self.host + other.host)

    @property
    def total(self) -> int:
        return self.device + self.host

    def at(self, place: Place) -> int:
        return self.host if place.on_host else self.device


class CacheOutOfMemory(Exception):
    """The allocator refused a cache; `str()` is what it said."""


Allocate = Callable[[Slot, Place], torch.Tensor]


def allocate(slot: Slot, place: Place) -> torch.Tensor:
    """Zeros for `slot`. Raises what PyTorch raises when memory runs out."""
    with torch.inference_mode(False):  # a cache made in inference mode could not be written outside it
        if place.pinned:
            return pinned(slot.shape, slot.dtype, place.device)
        return torch.zeros(slot.shape, dtype=slot.dtype, device="cpu" if place.on_host else place.device)


class Store:
    """Makes and keeps cells. `shared`: what the branches of a site have in common; `stage`: buffers on the device, by lane."""

    def __init__(self, allocate: Allocate = allocate) -> None:
        self.allocate = allocate
        self.shared: Home = Home()
        self.stage: dict[int, Cell] = {}
        self._lanes: dict[torch.device, tuple[torch.Tensor, list[torch.cuda.Stream]]] = {}
        self._spare: dict[Slot, list[torch.Tensor]] = {}  # host buffers of caches that were dropped
        self._stream: torch.cuda.Stream | None = None  # of the call before
        self._raw: tuple[int | None, int] | None = None  # the same: its device and what CUDA knows it by

    def follow(self, device: torch.device) -> None:
        """Buffers serve one call after the other: have this call's stream wait for that of the call before."""
        if device.type != "cuda":
            return
        raw = (device.index, torch._C._cuda_getCurrentRawStream(device.index))  # cheaper than the object
        if raw != self._raw:
            before, self._stream, self._raw = self._stream, torch.cuda.current_stream(device), raw
            if before is not None:
                self._stream.wait_stream(before)

    def make(self, slots: Sequence[Slot], place: Place) -> Cell:
        """Raises `CacheOutOfMemory`."""
        try:
            return Cell({slot.name: self._tensor(slot, place) for slot in slots}, place)
        except (RuntimeError, MemoryError, OSError) as error:  # a CPU's allocator has no class of its own
            self._spare.clear()
            reason = str(error).split("\n")[0]
        raise CacheOutOfMemory(reason)

    def staged(self, lane: int, slots: Sequence[Slot], device: torch.device) -> Cell:
        """The buffers of `lane`. Raises `CacheOutOfMemory`."""
        place = Place(device)
        if lane not in self.stage or not self.stage[lane].holds(slots, place):
            if self.stage.pop(lane, None):
                _wait(device)
            self.stage[lane] = self.make(slots, place)
        return self.stage[lane]

    def lanes(self, device: torch.device, count: int) -> torch.Tensor:
        """int64 [count or more, 3] on the CPU: a stream of `device` for each lane (chipmunk_fx.ops.transfer)."""
        table, streams = self._lanes.get(device, (torch.zeros(0, 3, dtype=torch.int64, device="cpu"), []))
        if len(table) < count:
            if device.type == "cuda":
                streams = [*streams, *(torch.cuda.Stream(device) for _ in range(count - len(streams)))]
            rows = [(s.stream_id, s.device_index, s.device_type) for s in streams] or [(0, 0, 0)] * count
            with torch.inference_mode(False):
                table = torch.tensor(rows, device="cpu")
            self._lanes[device] = table, streams
        return table

    def drop(self, homes: Iterable[Home]) -> None:
        """Forget all caches in `homes`; buffers in host memory, which are slow to make, serve the next that fit."""
        for home in homes:
            for sites in list(home.values()):
                for cell in sites.values():
                    self.spare(cell)
            home.clear()

    def spare(self, cell: Cell) -> None:
        if cell.place.on_host:
            _wait(cell.place.device)
            for name, tensor in cell.tensors.items():
                self._spare.setdefault(Slot(name, tuple(tensor.shape), tensor.dtype), []).append(tensor)

    def forget(self) -> None:
        """Free what branches share, what is staged, and what is spare."""
        for cell in self.stage.values():
            _wait(cell.place.device)
        for kept in (self.shared, self.stage, self._spare):
            kept.clear()

    def _tensor(self, slot: Slot, place: Place) -> torch.Tensor:
        if place.on_host:
            plain = Slot(slot.name, slot.shape, slot.dtype)
            if spare := self._spare.get(plain):
                return spare.pop()
            self._spare.clear()  # of shapes that nobody asks for any more
        return self.allocate(slot, place)


def account(homes: Iterable[Home]) -> Account:
    cells = [cell for home in homes for sites in home.values() for cell in sites.values()]
    host = sum(cell.bytes for cell in cells if cell.place.on_host)
    return Account(sum(cell.bytes for cell in cells) - host, host)


def _wait(device: torch.device) -> None:
    """Copies to or from a buffer that changes hands may be under way on other streams."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
