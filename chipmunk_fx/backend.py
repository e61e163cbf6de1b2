"""The Dynamo entry `torch.compile(model, backend="chipmunk")` and the functions that look at a compiled model.

The only file that imports all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx

import chipmunk_fx.ops  # noqa: F401  (registers the ops and their kernels)
from chipmunk_fx.config import Config
from chipmunk_fx.errors import ArgumentError, ChipmunkError, ConfigError, FallbackError
from chipmunk_fx.graph.capture import Capture, Uncapturable, capture
from chipmunk_fx.graph.geometry import find_geometry, sequence_lengths
from chipmunk_fx.graph.inputs import classify
from chipmunk_fx.graph.match import find
from chipmunk_fx.graph.plan import Plan, make_plan
from chipmunk_fx.graph.sizes import concrete
from chipmunk_fx.kernels import group_rows
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.patterns import ALL
from chipmunk_fx.runtime import precision, registry, renewal
from chipmunk_fx.runtime.collector import resting_collector
from chipmunk_fx.runtime.gate import cost_gate
from chipmunk_fx.runtime.graphs import Graph
from chipmunk_fx.runtime.placement import fit, limit, notes
from chipmunk_fx.runtime.report import Report, explain_model, report_of
from chipmunk_fx.runtime.session import Session
from chipmunk_fx.runtime.summary import Summary, summarize
from chipmunk_fx.runtime.tracing import is_resumed, rest_while_tracing
from chipmunk_fx.runtime.variants import Variants, inductor_patches, lower
from chipmunk_fx.schedule.phase import Phase

_log = logger("plan")


def chipmunk(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. `options` and `mode` as in the README; a bad option raises `ConfigError` at the call."""
    try:
        config = Config.from_options(options, mode)
        if needs_gradients(example_inputs):
            _log.warning(
                "gradients are needed: compiled as with Inductor alone. For sparse inference call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
            return _plain(graph_module, example_inputs, config)
        return _compile(graph_module, example_inputs, config)
    except (ConfigError, FallbackError) as error:
        return _raising(error)


def needs_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)


def analyse(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> tuple[Capture, Plan]:
    """Capture, match and plan; edits and compiles nothing. Raises `Uncapturable`."""
    captured, inputs = capture(graph_module, inputs), concrete(inputs)
    candidates = find(captured.module, ALL)
    roles = classify(captured)
    geometry = find_geometry(captured, roles, config.tokens, sequence_lengths(candidates), inputs)
    judge = partial(cost_gate, config=config)
    plan = make_plan(captured, candidates, roles, geometry, config, judge, inputs, group_rows)
    return captured, fit(renewal.settle(precision.settle(plan, config), config), config)


def explain(model: nn.Module, *args: Any, config: Any = None, **kwargs: Any) -> Report:
    """Which sites of `model(*args, **kwargs)` would be rewritten, and why the others would not.

    `config`: None, a `Config`, a mapping of options, or the path of a YAML file. Compiles nothing; a model whose graph breaks
    is run once. Raises `ConfigError`, and `ArgumentError` where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError.no_module("model", model, registry.parts(model))
    return explain_model(model, args, kwargs, _config_of(config), _inspect)


def summary(model: nn.Module, key: Any = None) -> Summary:
    """What the generation begun last did, or the one named `key`. Raises `NotCompiledError`, and KeyError for `key`."""
    return summarize(registry.sessions(model), key, named=key is not None, met=registry.is_met(model))


def reset(model: nn.Module) -> None:
    """The next call of `model` begins a generation. Raises `NotCompiledError`."""
    for session in registry.sessions(model):
        session.reset()


@contextmanager
def generation(model: nn.Module, key: Any = None, branch: int | None = None) -> Iterator[None]:
    """Calls inside belong to the generation `key` (a new one where None), and to `branch` where given.

    Entering again with the same key goes on with that generation. Raises `NotCompiledError`, and `ArgumentError` for a key
    without a hash and a branch that is no number of one.
    """
    if not _has_hash(key):
        raise ArgumentError.of(
            "key", key, "a hashable value, such as a string or a number, or None for a new generation"
        )
    if branch is not None and not (isinstance(branch, int) and branch >= 0):
        raise ArgumentError.of("branch", branch, "an integer of at least 0, or None to have it told from the call")
    registry.sessions(model)
    with registry.scope(model, key, branch):
        yield


def _has_hash(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _compile(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    try:
        with resting_collector():
            captured, plan = _analyse(graph_module, inputs, config)
    except Uncapturable as reason:
        return _unchanged(graph_module, inputs, config, str(reason))
    except ChipmunkError:
        raise
    except Exception as error:  # a graph unlike any seen so far must not cost the user the model
        _log.debug("analysis failed", exc_info=True)
        return _unchanged(graph_module, inputs, config, f"its analysis failed ({type(error).__name__}: {error})")
    _log.info("%s", _report(captured, plan, config))
    if not plan.rewritten and not plan.streams:
        return _unchanged(graph_module, inputs, config, _why_nothing(plan))
    if plan.roles.constant:
        _log.warning("%s", plan.roles.constant)
    graph = Graph(captured, plan, config, Variants(graph_module, captured, plan, config), resumed=is_resumed())
    if captured.dynamic:
        _build_all(graph, inputs)

    notices = Notices()

    def make(row: int, said: Notices) -> Session:
        return Session(config, lambda place: limit(config, place), row, said)

    def call(*values: Any) -> Any:
        session = registry.session_of(values[graph.owner], config, graph.is_piece, make)
        if graph.in_passing(session, session.calls):
            return _dense(graph, values, notices)
        return session.call(graph, values)

    return call


def _analyse(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> tuple[Capture, Plan]:
    """`analyse`, where a grid that fitted an earlier call of the model is none for the sizes of this one."""
    try:
        return analyse(graph_module, inputs, config)
    except ConfigError as error:
        if error.key != "tokens.grid" or not registry.has_session(inputs, config):
            raise
        _log.warning(
            "tokens.grid is for other sizes than those of this call, whose grid and text are told from the graph: %s",
            error,
        )
        # The count of text tokens goes with the grid: one of the two alone would explain no length.
        return analyse(graph_module, inputs, replace(config, tokens=replace(config.tokens, grid="auto", text="auto")))


def _dense(graph: Graph, values: Sequence[Any], notices: Notices) -> Any:
    reason = (
        "the model's Parameter objects are replaced at every call (hooks of sequential offloading do that), so that "
        "caches cannot be kept by them"
    )
    if graph.config.strict:
        raise FallbackError.of("this call", reason)
    notices.once(logger("runtime"), f"running dense: {reason}")
    return graph.variants.original()(*values)


def _build_all(graph: Graph, inputs: Sequence[Any]) -> None:
    """All variants now: guards that a variant built later would add are not enforced under dynamic shapes."""
    scratch = Session(graph.config, lambda place: sys.maxsize, 0, Notices())
    state = scratch.example_state(graph, concrete(inputs))
    graph.variants.original()
    for phase in variants_of(graph):
        two = phase is Phase.REFRESH and graph.keeps_lists and not graph.plan.tells_known
        for renew in (True, False) if two else (True,):
            graph.variants.get(phase, state[: graph.counts[phase]], renew)


def variants_of(graph: Graph) -> list[Phase]:
    """The phases that have graphs of their own."""
    plan = graph.plan
    phases = [Phase.REFRESH, Phase.SPARSE] if plan.rewritten else []
    computed = plan.stores(Phase.DENSE) and (graph.config.schedule.dense_steps or not plan.rewritten)
    dense = [Phase.DENSE] if computed or graph.improves_dense else []
    return [*dense, *phases, *([Phase.SKIP] if plan.streams else [])]


def _unchanged(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config, reason: str) -> Callable[..., Any]:
    if config.strict:
        raise FallbackError.of("this graph", reason)
    _log.warning("nothing is rewritten: %s. The graph is compiled as with Inductor alone.", reason)
    return _plain(graph_module, inputs, config)


def _plain(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compiled as with Inductor alone; a call lets the registry know the model, so that it can be asked about."""
    owner = next((i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)), None)
    if config.lowering == "eager":
        run = lower(graph_module, inputs, config)
    else:
        run: Any = compile_fx(graph_module, list(inputs), config_patches=inductor_patches(config))
    if owner is None:
        return run

    def call(*values: Any) -> Any:
        registry.meet(values[owner])
        return run(*values)

    return call


def _why_nothing(plan: Plan) -> str:
    if not plan.sites and not plan.refused:
        return "no attention and no MLP was found in the graph"
    reasons = [s.reason for s in plan.sites] or [c.reason or "" for c in plan.refused]
    counts = {r: reasons.count(r) for r in dict.fromkeys(reasons)}
    common = sorted(counts.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{n} x {r}" for r, n in common[:4])
    kind = "accepted sites stay dense" if plan.sites else "candidates were refused"
    return f"all {len(reasons)} {kind} ({listed})"


def _raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def _config_of(config: Any) -> Config:
    if isinstance(config, Config):
        return config
    if config is None or isinstance(config, Mapping):
        return Config.from_options(config, None)
    return Config.from_options({"config": config}, None)


def _report(captured: Capture, plan: Plan, config: Config) -> Report:
    region = plan.region
    told = f"no step can be skipped: {region}" if isinstance(region, str) else f"blocks that can be skipped: {region}"
    number = [str(plan.roles.constant)] if plan.roles.constant else []
    return report_of(plan, [entry.name for entry in captured.inputs], [told, *number, *notes(plan, config)])


def _inspect(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Report:
    try:
        captured, plan = analyse(graph_module, inputs, config)
    except Uncapturable as reason:
        return _left(str(reason))
    except ChipmunkError:
        raise
    except Exception as error:  # as in `_compile`
        return _left(f"its analysis failed ({type(error).__name__}: {error})")
    return _report(captured, plan, config)


def _left(reason: str) -> Report:
    return Report((), None, None, (), "unknown", 0.0, (f"a graph stays as it is: {reason}",))


rest_while_tracing()
