"""Which models can be asked about: those that torch.compile was given, whether or not anything of them is rewritten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import chipmunk_fx
from chipmunk_fx import ArgumentError, NotCompiledError
from tests.runtime.models import SPARSE, TinyDiT, calls, chipmunk, compiled, run

TIMES = (900, 700)
DENSE = {"lowering": "eager"}  # two blocks: all are among the first that stay dense


def entered(model: Any, **arguments: Any) -> None:
    with chipmunk_fx.generation(model, **arguments):
        pass


LOOKS: list[Callable[[Any], Any]] = [chipmunk_fx.summary, chipmunk_fx.reset, entered]


class Holder(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer


class Pipeline:
    """No module itself, as diffusers' pipelines are none."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.steps = transformer, 50


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def through_function(model: nn.Module) -> Any:
    return torch.compile(lambda *inputs: model(*inputs), backend="chipmunk", options=DENSE)


def through_forward(model: nn.Module) -> Any:
    model.forward = torch.compile(model.forward, backend="chipmunk", options=DENSE)
    return model


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "a module": lambda model: chipmunk(model, options=DENSE),
    "a function": through_function,
    "a forward": through_forward,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_which_nothing_is_rewritten_is_known_by_its_call(way: str):
    model = TinyDiT(depth=2)
    run(WAYS[way](model), calls(TIMES))
    for view in (model, Holder(model)):
        assert [look(view) for look in LOOKS[1:]] == [None, None]
        assert "nothing of the model was rewritten" in str(chipmunk_fx.summary(view))


def test_models_that_share_a_graph_are_each_known():
    first, second = TinyDiT(depth=2), TinyDiT(depth=2, seed=1)
    once = torch.compile(lambda model, *inputs: model(*inputs), backend="chipmunk", options=DENSE)
    for model in (first, second):
        run(lambda *inputs, model=model: once(model, *inputs), calls(TIMES))
        assert "nothing of the model was rewritten" in str(chipmunk_fx.summary(model))


def test_a_model_that_is_trained_is_known():
    model = TinyDiT()
    compiled(model)(*calls(TIMES)[0]).sum().backward()
    assert "nothing of the model was rewritten" in str(chipmunk_fx.summary(model))


@pytest.mark.parametrize("way", ["a module", "a forward"])
def test_before_the_first_call_the_original_and_a_parent_are_known(way: str):
    model = TinyDiT()
    ours = WAYS[way](model)
    for view in (ours, model, Holder(model), Holder(ours)):
        assert [look(view) for look in LOOKS[1:]] == [None, None]
        assert "no call has reached the backend yet" in str(chipmunk_fx.summary(view))


def test_a_generation_of_the_original_may_stand_around_the_first_call():
    model = TinyDiT()
    ours = compiled(model)
    with chipmunk_fx.generation(model, key="first"):
        run(ours, calls(TIMES))
    assert chipmunk_fx.summary(model, key="first").phases == {0: ["refresh", "sparse"]}


def test_a_model_beyond_the_recompile_limit_is_known_as_not_reached():
    models = [TinyDiT(seed=seed) for seed in range(2)]
    ours = [chipmunk(model, options=SPARSE | {"seed": seed}) for seed, model in enumerate(models)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for model in ours:
            run(model, calls(TIMES))
    assert chipmunk_fx.summary(models[0]).phases
    assert "no call has reached the backend yet" in str(chipmunk_fx.summary(models[1]))


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_no_module_is_refused_with_what_to_pass(look: Callable[[Any], Any]):
    model = TinyDiT(depth=2)
    for other in (None, through_function(model), object()):
        with pytest.raises(NotCompiledError, match=f"^{type(other).__name__} is no module.*Pass the module itself"):
            look(other)
    with pytest.raises(NotCompiledError, match=r"^Pipeline is no module.*Pass one of its modules \(transformer\)"):
        look(Pipeline(model))


def test_explain_takes_modules_only():
    for other in (None, lambda x: x):
        with pytest.raises(ArgumentError, match="model = .*Pass the module itself"):
            chipmunk_fx.explain(other, *calls(TIMES)[0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Pass one of its modules \(transformer\)"):
        chipmunk_fx.explain(Pipeline(TinyDiT()), *calls(TIMES)[0])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "name, value", [("key", ["a"]), ("key", ("a", [])), ("branch", -1), ("branch", "cond"), ("branch", 0.5)]
)
def test_a_generation_cannot_have_any_key_and_branch(name: str, value: Any):
    with pytest.raises(ArgumentError, match=f"^{name} = .* is not allowed. Allowed: ") as error:
        entered(compiled(TinyDiT()), **{name: value})
    assert repr(value) in str(error.value)
