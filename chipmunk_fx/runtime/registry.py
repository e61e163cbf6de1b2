"""From a model's Parameter objects to the sessions that keep its state: the only process-wide object of the package.

Weak on the parameters: when a model is freed, its sessions and their caches go with it. A string backend leaves nothing on
the compiled module that leads back to us, and two models of one class may share a compiled graph; parameters are what
arrives intact at every call.
"""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.errors import NotCompiledError
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.state.store import Account

if TYPE_CHECKING:
    from chipmunk_fx.runtime.session import Session

Make = Callable[[int, Notices], "Session"]


class _Registry:
    """Sessions by parameter, and how many sessions in a row were new: the index of a block in its model's first pass."""

    def __init__(self) -> None:
        # Parameter -> list[Session], which is empty where nothing was rewritten
        self.by_parameter: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.row = 0
        self.notices = Notices()  # of the row: what concerns all pieces of a model is said once
        self.lock = threading.Lock()

    def session_of(self, owner: torch.Tensor, tag: Any, piece: bool, make: Make) -> Session:
        with self.lock:
            known = self.by_parameter.setdefault(owner, [])
            for session in known:
                if session.tag is tag or session.tag == tag:
                    if piece:
                        self.row = 0  # the next new session belongs to another model
                    return session
            if self.row == 0 or not piece:
                self.notices = Notices()
            known.append(session := make(self.row if piece else 0, self.notices))
            self.row += piece
            return session

    def meet(self, owner: torch.Tensor) -> None:
        with self.lock:
            self.by_parameter.setdefault(owner, [])

    def others(self, owner: torch.Tensor, session: Session) -> list[Session]:
        with self.lock:
            return [known for known in self.by_parameter.get(owner, ()) if known is not session]

    def has_session(self, parameters: Iterable[nn.Parameter], tag: Any) -> bool:
        with self.lock:
            return any(s.tag == tag for p in parameters for s in self.by_parameter.get(p, ()))

    def held(self, tag: Any) -> Account:
        with self.lock:
            own = [s.held for known in self.by_parameter.values() for s in known if s.tag == tag]
        return sum(own, Account())


_REGISTRY = _Registry()


@dataclass(eq=False)
class Scope:
    """Marks the calls of some parameters as belonging to the generation `key` (and to `branch`, if given).

    first: the session of the piece that is called first. doubt: why calls cannot be told apart, which that one finds for all.
    """

    parameters: frozenset[int]
    key: Any
    branch: int | None
    first: Session | None = None
    doubt: str | None = None

    def asks(self, session: Session) -> bool:
        """Whether the caller names no branch, and the session is of the piece that is called first."""
        self.first = self.first or session
        return self.branch is None and self.first is session


_CROSSED = (
    "a `generation` block was left before one that was entered after it, as where Python's generators take turns: calls between "
    "them were taken for the inner one's. Enter the block around each call, with a key"
)
# Per thread and per asyncio task, so that interleaved requests do not see each other's scope.
_SCOPES: contextvars.ContextVar[tuple[Scope, ...]] = contextvars.ContextVar("chipmunk_fx_scopes", default=())


def session_of(owner: torch.Tensor, tag: Any, piece: bool, make: Make) -> Session:
    """The session of the parameter `owner` with the same `tag` (settings), made at its first call.

    `make` is told its place among the pieces of a model (blocks compiled one by one), 0 for a whole model, and what has
    been said of that model.
    """
    return _REGISTRY.session_of(owner, tag, piece, make)


def meet(owner: torch.Tensor) -> None:
    """The model of the parameter `owner` was called in a graph of which nothing is rewritten."""
    _REGISTRY.meet(owner)


def has_session(values: Iterable[Any], tag: Any) -> bool:
    """Whether one of the `values` is a parameter with a session of this `tag`."""
    return _REGISTRY.has_session((v for v in values if isinstance(v, nn.Parameter)), tag)


def held(tag: Any) -> Account:
    """Bytes of the caches of all sessions with these settings: the blocks of a model share its memory budget."""
    return _REGISTRY.held(tag)


def others(owner: torch.Tensor, session: Session) -> list[Session]:
    """The sessions that other settings have for the parameter `owner`."""
    return _REGISTRY.others(owner, session)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module behind what torch.compile returned."""
    return getattr(model, "_orig_mod", model)


def sessions(model: nn.Module) -> list[Session]:
    """All sessions that calls of `model` made, in order of their first call. Raises `NotCompiledError`."""
    if not isinstance(model, nn.Module):
        raise NotCompiledError.no_module(model, parts(model))
    found = {id(s): s for p in _tensors(model) for s in _REGISTRY.by_parameter.get(p, ())}
    if not found and not is_met(model) and not compiled_with_us(model):
        raise NotCompiledError.of(model)
    return sorted(found.values(), key=lambda session: session.born)


def is_met(model: nn.Module) -> bool:
    """Whether calls of `model` have reached the backend."""
    return any(tensor in _REGISTRY.by_parameter for tensor in _tensors(model))


def parts(holder: object) -> list[str]:
    """Names of what an object that is no module itself (a pipeline) holds as modules."""
    return [name for name, value in getattr(holder, "__dict__", {}).items() if isinstance(value, nn.Module)]


class Unnamed:
    """The key of a generation whose caller gave none. Nobody can enter it again once its block is left."""

    over = False


@dataclass(frozen=True)
class OfThread(Unnamed):
    """The key of what a thread other than the main one calls outside any `generation` block."""

    thread: weakref.ref[threading.Thread]

    @property
    def over(self) -> bool:
        thread = self.thread()
        return thread is None or not thread.is_alive()


@contextmanager
def scope(model: nn.Module, key: Any, branch: int | None) -> Iterator[None]:
    own = Unnamed() if key is None else key
    entered = Scope(frozenset(id(p) for p in _tensors(model)), own, branch)
    _SCOPES.set((*_SCOPES.get(), entered))
    try:
        yield
    finally:
        if isinstance(own, Unnamed):
            own.over = True
        around = _SCOPES.get()
        if around[-1:] != (entered,):
            logger("runtime").warning(_CROSSED)
        _SCOPES.set(tuple(scope for scope in around if scope is not entered))


def active_scope(owner: torch.Tensor) -> Scope | None:
    """The innermost `generation` block around this call that names a model with this parameter."""
    return next((s for s in reversed(_SCOPES.get()) if id(owner) in s.parameters), None)


def thread_key() -> OfThread | None:
    """The key of calls outside any scope, so that threads do not see each other's state."""
    thread = threading.current_thread()
    return None if thread is threading.main_thread() else OfThread(weakref.ref(thread))


def compiled_with_us(model: nn.Module) -> bool:
    """Whether the module, or one inside it, was given to torch.compile with this backend (called or not)."""
    modules = list(model.modules())
    calls = (vars(m).get(name) for m in modules for name in ("_compiled_call_impl", "forward"))
    return any(map(_wraps, modules)) or any(map(_calls_us, calls)) or any(map(_wraps, _wrappers(modules)))


def _wraps(module: nn.Module) -> bool:
    return is_ours(vars(module).get("dynamo_ctx"))


def _wrappers(modules: Iterable[nn.Module]) -> list[OptimizedModule]:
    """What torch.compile returned for the modules: until it is called, only the garbage collector knows."""
    own = {id(module) for module in modules}
    wrappers = [kept for kept in gc.get_objects() if type(kept) is OptimizedModule]
    return [w for w in wrappers if id(vars(w).get("_modules", {}).get("_orig_mod")) in own]


def _calls_us(call: Any) -> bool:
    cells = getattr(call, "__closure__", None) or ()
    return any(is_ours(cell.cell_contents) for cell in cells)


def is_ours(context: Any) -> bool:
    """Whether this backend stands in Dynamo's wrappers."""
    return _backend_name(context) == "chipmunk"


def _backend_name(context: Any) -> str | None:
    """The name given to torch.compile, found through Dynamo's chain of wrappers."""
    backend = getattr(context, "callback", context)
    for _ in range(8):
        name = getattr(backend, "compiler_name", None)
        if isinstance(name, str):
            return name
        inner = getattr(backend, "_torchdynamo_orig_backend", None)
        if inner is None:
            return None
        backend = inner
    return None


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from unwrap(model).parameters()
    yield from unwrap(model).buffers()
