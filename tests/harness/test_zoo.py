"""The harness itself: models run, inputs move as a generation's do, and the facts speak of the models at hand."""

import pytest
import torch

from tests.harness.tolerance import assert_near, assert_within_twice, relative
from tests.harness.zoo import ZOO, build, cast, enlarged, facts, first_tensor, names, step_inputs


@torch.no_grad()
def predict(model, inputs):
    return first_tensor(model(**inputs))


def test_the_zoo_has_23_models_with_facts():
    assert len(names()) == 23
    assert all({"attention", "mlp", "cross", "timestep"} <= facts(name).keys() for name in names())


@pytest.mark.parametrize("name", names())
def test_a_model_runs_and_follows_its_inputs(name: str):
    model, inputs = build(name)
    still, moved = (predict(model, step_inputs(name, inputs, i=2, n=50, drift=drift)) for drift in (0.0, 0.05))
    assert still.isfinite().all()
    assert 0 < relative(moved, still) < 1
    later = predict(model, step_inputs(name, inputs, i=40, n=50, drift=0.0))
    assert relative(later, still) > 0, "the timestep has no effect"


@pytest.mark.parametrize("name", names())
def test_a_model_is_reproducible(name: str):
    (first, inputs), (second, again) = build(name, seed=3), build(name, seed=3)
    assert torch.equal(predict(first, inputs), predict(second, again))


@pytest.mark.parametrize("name", names())
def test_steps_change_latents_and_timestep_alone(name: str):
    entry, (_, inputs) = ZOO[name], build(name)
    steps = [step_inputs(name, inputs, i, n=50) for i in range(3)]
    assert steps[0].keys() == inputs.keys()
    assert torch.equal(steps[0][entry.latents], inputs[entry.latents])
    assert all((a[entry.timestep] > b[entry.timestep]).all() for a, b in zip(steps, steps[1:], strict=False))
    untouched = inputs.keys() - {entry.latents, entry.timestep}
    assert all(step[key] is inputs[key] for step in steps for key in untouched)


@pytest.mark.parametrize("name", [name for name in names() if facts(name)["attention"]])
def test_enlarged_has_512_rows_to_attend(name: str, monkeypatch: pytest.MonkeyPatch):
    rows = []
    softmax, sdpa = torch.Tensor.softmax, torch.nn.functional.scaled_dot_product_attention

    def watch_softmax(scores, *args, **kwargs):
        rows.append(scores.shape[-2])
        return softmax(scores, *args, **kwargs)

    def watch_sdpa(query, key, value, *args, **kwargs):
        rows.append(query.shape[-2])
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", watch_softmax)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch_sdpa)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    model, inputs = enlarged(name)
    assert predict(model, inputs).isfinite().all()
    assert max(rows) >= 512


@pytest.mark.parametrize("name", [name for name in names() if ZOO[name].bf16])
def test_a_cast_model_runs_in_bf16(name: str):
    model, inputs = cast(name, *build(name), torch.bfloat16)
    assert predict(model, step_inputs(name, inputs, i=1, n=50)).isfinite().all()


def test_nearness_is_measured_by_the_largest_norm_so_far():
    large, small = torch.full((4,), 100.0), torch.full((4,), 1.0)
    assert_near([large, small + 5e-3], [large, small])
    with pytest.raises(AssertionError, match="step 0: off by 5"):
        assert_near([small + 5e-4], [small])


def test_low_precision_is_measured_by_the_dense_error():
    exact = torch.ones(4)
    assert_within_twice([exact + 0.015], [exact + 0.01], [exact])
    with pytest.raises(AssertionError, match="step 0: error 3"):
        assert_within_twice([exact + 0.03], [exact + 0.01], [exact])
