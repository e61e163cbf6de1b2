"""The caches that one model's session holds: counted, and given up where others need the memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from chipmunk_fx.graph.plan import Site
from chipmunk_fx.runtime.faults import Faults
from chipmunk_fx.runtime.generations import Branch, Track
from chipmunk_fx.runtime.registry import Unnamed, held
from chipmunk_fx.state.store import Account, Home, Place, Store, account


class OverBudget(Exception):
    """A branch's caches do not fit the memory budget."""

    def __init__(self, total: int, limit: str, on_host: bool) -> None:
        super().__init__(f"caches of {total / 1e9:.3g} GB exceed {limit}")
        self.limit, self.on_host = limit, on_host


class Holdings:
    """Generations by key, with the caches of each. limit: bytes that all sessions may hold at a place; tag: the settings that
    share it."""

    def __init__(self, limit: Callable[[Place], int], tag: Any) -> None:
        self.limit, self.tag = limit, tag
        self.lock = threading.RLock()
        self.tracks: dict[Any, Track] = {}
        self.store = Store()
        self.shared_bytes: dict[int, dict[str, int]] = {}  # by site index and slot name
        self.held = Account()  # of all caches, read by other sessions
        self.latest: Any = None  # key of the generation called last

    def release(self) -> bool:
        """Free all caches, for settings that need the memory; false where there are none, or a call is under way."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            had = self.account().total > 0
            self._free(self.tracks.values())
            self.store.forget()
            self.held = self.account()
            return had
        finally:
            self.lock.release()

    def account(self) -> Account:
        """Of all caches; the buffers that those on the host pass through are not among them."""
        return account(self._homes())

    def _inherited(self) -> dict[str, Any]:
        """Buffers of a generation that nobody can enter again, kept until now for its summary; others are freed."""
        over = [key for key in self.tracks if isinstance(key, Unnamed) and key.over]
        gone = [self.tracks.pop(key) for key in over]
        self._free(gone[:-1])
        self.held = self.account()
        return {"branches": gone[-1].branches, "shape": gone[-1].shape} if gone else {}

    def _forsake(self, faults: Faults, owner: torch.Tensor, site: Site, reason: str) -> None:
        """The site stays dense as long as `faults` last, and its caches go."""
        faults.exempt(owner, site, reason)
        for home in self._homes():
            sites = home.get(owner, {})
            for key in [key for key in sites if key[0] == site.ordinal]:
                del sites[key]
        for each in self.tracks.values():
            each.prepared.clear()
            for branch in each.branches.values():
                branch.held.pop(site.index, None)
        self.shared_bytes.pop(site.index, None)
        self.held = self.account()

    def _sweep(self, branches: Iterable[Branch]) -> None:
        """Give up caches that the generation that is over did not use: they are of other sizes, or of other blocks."""
        for branch in branches:
            for owner, sites in list(branch.caches.items()):
                for key in [key for key in sites if branch.used and (id(owner), key) not in branch.used]:
                    self.store.spare(sites.pop(key))

    def _make_room(self, need: int, place: Place) -> None:
        """Drop the caches of the generations that were called longest ago until `need` bytes fit the budget."""
        self.held = self.account()
        limit = self.limit(place)
        while (total := need + held(self.tag).at(place)) > limit:
            if not self._free_idle():
                name = "what is free of host memory" if place.on_host else "memory.budget_gb"
                raise OverBudget(total, f"{name} ({limit / 1e9:.3g} GB)", place.on_host)

    def _free_idle(self) -> bool:
        """Free the generation that was called longest ago, of those that are not under way; false where there is none."""
        idle = [t for k, t in self.tracks.items() if k != self.latest and t.branches]
        if idle:
            oldest = min(idle, key=lambda track: track.last_call)
            self._free([oldest])
            oldest.dropped = True
        return bool(idle)

    def _free(self, tracks: Iterable[Track]) -> None:
        for track in tracks:
            self.store.drop([branch.caches for branch in track.branches.values()])
            track.branches.clear()
            track.prepared.clear()
        self.held = self.account()

    def _homes(self) -> list[Home]:
        return [self.store.shared, *(b.caches for t in self.tracks.values() for b in t.branches.values())]
