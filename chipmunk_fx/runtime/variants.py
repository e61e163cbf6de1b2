"""One compiled callable a phase, made when it is first needed (for dynamic shapes at once: late guards are not enforced)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._inductor import config as inductor
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from chipmunk_fx.config import Config
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.plan import Plan
from chipmunk_fx.graph.rewrite import rewrite
from chipmunk_fx.graph.rotary import fuse_rotary
from chipmunk_fx.log import logger
from chipmunk_fx.runtime.collector import resting_collector
from chipmunk_fx.schedule.phase import Phase

_log = logger("runtime")

# Of queries that are normed and rotated, from which on an operator of our own is worth its launch. H100, 27 MB: it takes 25 us
# where Inductor's kernel takes 41, but 60 to launch where no CUDA graph does.
ROTARY_BYTES = 64 << 20
RECORDED_ROTARY_BYTES = 4 << 20


def inductor_patches(config: Config) -> dict[str, Any]:
    """Inductor settings of `mode` and of the `inductor.<name>` options."""
    options = dict(config.inductor)
    mode = options.pop("mode", None)
    return {**(list_mode_options(mode) if mode else {}), **options}


def records_graphs(config: Config) -> bool:
    """Whether Inductor records CUDA graphs: as the options say or, where they say nothing, as its own settings do."""
    said = inductor_patches(config).get("triton.cudagraphs", inductor.triton.cudagraphs)
    return config.lowering != "eager" and bool(said)


def lower(module: fx.GraphModule, inputs: Sequence[Any], config: Config, **patches: Any) -> Callable[..., Any]:
    """Compile with Inductor, or run op by op where `lowering` is "eager"."""
    if config.lowering == "eager":
        return module.forward
    return compile_fx(module, list(inputs), config_patches={**inductor_patches(config), **patches})  # pyright: ignore[reportReturnType]


def owned(compiled: Callable[..., Any], given: Sequence[int]) -> Callable[..., Any]:
    """CUDA graphs leave their results where those of the next call will be: the caller gets copies to keep.

    given: positions of the caller's own tensors, which a model may hand back as they are.
    """

    def call(*values: Any) -> list[Any]:
        known = {_storage(values[i]) for i in given}
        return [x if (at := _storage(x)) is None or at in known else x.clone() for x in compiled(*values)]

    return call


def _storage(x: Any) -> int | None:
    return x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None


class Variants:
    """The dense graph as Dynamo gave it, and the rewritten ones."""

    def __init__(
        self,
        original: fx.GraphModule,
        capture: Capture,
        plan: Plan,
        config: Config,
        whole: Variants | None = None,
    ) -> None:
        self.graph, self.capture, self.plan, self.config, self.whole = original, capture, plan, config, whole
        self._made: dict[tuple[Phase | None, bool], Callable[..., Any]] = {}
        self._recorded = records_graphs(config)
        self._given = [i for i, entry in enumerate(capture.inputs) if not entry.is_parameter]
        self._lock = threading.Lock()

    def original(self) -> Callable[..., Any]:
        """The graph that nothing was rewritten in."""
        return self.whole.original() if self.whole else self._get(None, [], True)

    def of(self, plan: Plan) -> Variants:
        """Those of another plan for the same graph."""
        return Variants(self.graph, self.capture, plan, self.config, self.whole or self)

    def get(self, phase: Phase, state: Sequence[torch.Tensor], renew: bool = True) -> Callable[..., Any]:
        """The callable for `phase`; `state` are the tensors appended to its inputs. `renew` as in `rewrite`."""
        return self._get(phase, state, renew or self.plan.tells_known)

    def _get(self, phase: Phase | None, state: Sequence[torch.Tensor], renew: bool) -> Callable[..., Any]:
        if (phase, renew) in self._made:
            return self._made[phase, renew]
        with self._lock:  # models that share the graph may call it from several threads
            if (phase, renew) not in self._made:
                _log.debug("building the %s variant", phase or "unchanged")
                with tracing(self.capture.context), torch.no_grad(), resting_collector():
                    made = self._build(phase, state, renew)
                self._made[phase, renew] = owned(made, self._given) if self._recorded else made
            return self._made[phase, renew]

    def _build(self, phase: Phase | None, state: Sequence[torch.Tensor], renew: bool) -> Callable[..., Any]:
        if phase is None:
            return lower(self.graph, self.capture.fakes, self.config)
        module = rewrite(self.capture, self.plan, self.config, phase, renew)
        if fuse_rotary(module.graph, self._rotary_pays):
            module.recompile()
        fake_mode = self.capture.context.fake_mode
        assert fake_mode is not None
        fakes = [fake_mode.from_tensor(tensor, static_shapes=True) for tensor in state]
        # Only our ops look at the caches, whose sizes follow the call's: where these change, they are not asserted.
        sized_by_layer = self.config.attention.layers or self.config.mlp.layers  # one graph may serve several of them
        follows = self.capture.dynamic or self.plan.probe is not None or sized_by_layer
        patches = {"size_asserts": False} if follows else {}
        return lower(module, [*self.capture.fakes, *fakes], self.config, **patches)

    def _rotary_pays(self, x: torch.Tensor) -> bool:
        launched = self.config.lowering == "inductor" and not self._recorded
        least = ROTARY_BYTES if launched else RECORDED_ROTARY_BYTES
        return x.device.type == "cuda" and x.numel() * x.element_size() >= least
