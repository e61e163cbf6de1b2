"""The backend as users turn it on: options and their errors, gradients, and the functions that look at a model."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._inductor import list_mode_options

import chipmunk_fx
from chipmunk_fx import Config, ConfigError, NotCompiledError
from tests.runtime.models import (
    EXACT,
    SPARSE,
    TinyDiT,
    assert_same,
    calls,
    chipmunk,
    compiled,
    noise,
    one_thread,
    run,
    words,
)

TIMES = (900, 700, 500)
PHASES = {0: ["refresh", "sparse", "sparse"]}
CALL = calls(TIMES)[0]


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("chipmunk_fx")]


class Convolution(nn.Module):
    """No attention and no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, latents, timestep, text):
        return self.layer(latents) * timestep.sin()[:, None, None, None] + text.mean()


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x, text):
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Broken(TinyDiT):
    def forward(self, latents, timestep, text):
        x = super().forward(latents, timestep, text)
        torch._dynamo.graph_break()
        return super().forward(x, timestep, text)


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 96)

    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return flex_attention(q, k, v)


# Bad input


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"attention.densty": 0.1}, "attention.densty"),
        ({"attention.density": 0}, "attention.density"),
        ({"mlp.density": 1.5}, "mlp.density"),
        ({"attention.group_rows": 17}, "attention.group_rows"),
        ({"preset": "flax"}, "preset"),
        ({"inductor.max_autotuned": True}, "inductor.max_autotuned"),
        ({"tokens.grid": (1, 7, 7)}, "tokens.grid"),
        ({"config": "/nowhere/chipmunk-config.yml"}, "config"),
    ],
)
@pytest.mark.parametrize("suppress", [False, True])
def test_a_bad_option_is_a_config_error_at_the_first_call(options: dict, key: str, suppress: bool):
    model = chipmunk(TinyDiT(), options={"lowering": "eager"} | options)
    with torch._dynamo.config.patch(suppress_errors=suppress), pytest.raises(ConfigError) as error:
        run(model, [CALL])
    assert type(error.value) is ConfigError and error.value.key == key
    assert key in str(error.value) and "Allowed" in str(error.value)
    with pytest.raises(ConfigError):
        run(model, [CALL])


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path):
    path = tmp_path / "chipmunk-config.yml"
    path.write_text("attention: [1, 2\nmlp: }")
    with pytest.raises(ConfigError, match="chipmunk-config.yml"):
        run(chipmunk(TinyDiT(), options={"config": str(path)}), [CALL])


def test_a_model_without_attention_is_left_alone_with_one_warning(caplog: pytest.LogCaptureFixture):
    model = Convolution()
    ours = chipmunk(model, options={"lowering": "eager"})
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    (warning,) = warnings_of(caplog)
    assert "no attention and no MLP" in warning
    assert chipmunk_fx.summary(ours).phases == {}


def test_a_model_whose_sites_are_refused_says_why(caplog: pytest.LogCaptureFixture):
    model, x, text = Cross(), torch.randn(1, 24, 16), torch.randn(1, 8, 16)
    ours = chipmunk(model, options={"lowering": "eager"})
    with torch.no_grad():
        assert_same([ours(x, text)], [model(x, text)])
    (warning,) = warnings_of(caplog)
    assert "cross attention" in warning


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lowering": "eager"}, "attention.dense_layers"),
        (SPARSE | {"gate": "auto"}, "sparse is not faster below"),
        (SPARSE | {"attention.enabled": False, "mlp.enabled": False}, "mlp.enabled is false"),
    ],
)
def test_a_model_whose_sites_all_stay_dense_says_why(options: dict, why: str, caplog: pytest.LogCaptureFixture):
    model = TinyDiT()
    ours = chipmunk(model, options=options)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    (warning,) = warnings_of(caplog)
    assert why in warning


def test_strict_turns_that_warning_into_an_error():
    ours = chipmunk(TinyDiT(), options={"lowering": "eager", "strict": True})
    with pytest.raises(chipmunk_fx.FallbackError, match="dense_layers"):
        run(ours, [CALL])


@pytest.mark.parametrize(
    ("model", "inputs", "word"),
    [(Flex(), (torch.randn(1, 128, 16),), "flex_attention")],
)
def test_what_cannot_be_captured_is_left_alone(model, inputs, word: str, caplog: pytest.LogCaptureFixture):
    ours = chipmunk(model, options=SPARSE)
    with torch.no_grad():
        assert_same([ours(*inputs)], [model(*inputs)])
    assert len(warnings_of(caplog)) == 1 and word in warnings_of(caplog)[0]
    assert word in chipmunk_fx.explain(model, *inputs, config=SPARSE).notes[0]


# Gradients


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_are_right_and_hinted_at_once(caplog: pytest.LogCaptureFixture):
    model = TinyDiT()
    ours = chipmunk(model, options=SPARSE)
    for call in calls(TIMES):
        model.zero_grad()
        model(*call).square().sum().backward()
        expected = gradients(model)
        model.zero_grad()
        ours(*call).square().sum().backward()
        assert len(expected) == len(list(model.parameters()))
        assert_same(gradients(model), expected)
    (warning,) = warnings_of(caplog)
    assert "no_grad" in warning


def test_gradients_of_inputs_through_frozen_weights():
    model = TinyDiT().requires_grad_(False)
    ours = chipmunk(model, options=SPARSE)
    latents, *rest = CALL
    grads = []
    for one in (model, ours):
        given = latents.clone().requires_grad_()
        one(given, *rest).square().sum().backward()
        grads.append(given.grad)
    assert_same(grads[1:], grads[:1])


def test_frozen_weights_need_no_gradients():
    model = TinyDiT().requires_grad_(False)
    ours = chipmunk(model, options=EXACT)
    for call in calls(TIMES):
        assert_same([ours(*call)], [model(*call)])
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_training_and_inference_take_turns():
    model = TinyDiT()
    ours = chipmunk(model, options=EXACT)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        ours(*CALL).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
        assert chipmunk_fx.summary(ours).phases == PHASES


# Ways to turn it on


@pytest.mark.parametrize("fullgraph", [False, True])
def test_fullgraph_keeps_its_meaning(fullgraph: bool):
    ours = chipmunk(Broken(), fullgraph=fullgraph, options=EXACT)
    if fullgraph:
        with pytest.raises(Unsupported):
            run(ours, [CALL])
    else:
        assert_same(run(ours, [CALL]), run(Broken(), [CALL]))


def test_a_mode_is_taken_as_inductor_takes_it(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def compile_fx(module, inputs, config_patches):
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr("chipmunk_fx.backend.compile_fx", compile_fx)
    mode = "max-autotune-no-cudagraphs"
    more = {"inductor.mode": mode, "inductor.max_autotune": False, "inductor.coordinate_descent_tuning": True}
    for given in ({"mode": mode}, {"options": {"inductor.mode": mode}}, {"options": more}):
        torch._dynamo.reset()
        run(chipmunk(Convolution(), **given), [CALL])
    same = list_mode_options(mode)
    assert seen == [same, same, same | {"max_autotune": False, "coordinate_descent_tuning": True}]


def test_an_unknown_mode_is_a_config_error():
    with pytest.raises(ConfigError, match="mode"):
        run(chipmunk(TinyDiT(), mode="fastest"), [CALL])


def test_a_config_file_is_read(tmp_path: Path):
    path = tmp_path / "chipmunk-config.yml"
    path.write_text(Config.from_options(SPARSE | {"schedule.refresh_every": 2}).to_yaml())
    ours = chipmunk(TinyDiT(), options={"config": str(path)})
    run(ours, calls(TIMES))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh"]}


def test_the_exact_preset_is_exact():
    model = TinyDiT()
    ours = chipmunk(model, options={"preset": "exact", "lowering": "eager"})
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES
    assert all(site.status == "rewritten" for site in chipmunk_fx.summary(ours).sites)


# Looking at it


def test_a_model_compiled_in_place_is_found():
    model = TinyDiT()
    model.compile(backend="chipmunk", options=SPARSE)
    assert chipmunk_fx.summary(model).phases == {}
    run(model, calls(TIMES))
    assert chipmunk_fx.summary(model).phases == PHASES


def test_the_compiled_module_the_original_and_a_parent_show_the_same():
    class Pipeline(nn.Module):
        def __init__(self, transformer: nn.Module) -> None:
            super().__init__()
            self.transformer = transformer

    model = TinyDiT()
    ours = compiled(model)
    run(ours, calls(TIMES))
    for view in (ours, model, Pipeline(model), Pipeline(ours), model.blocks):
        assert chipmunk_fx.summary(view).phases == PHASES


def test_a_parent_of_compiled_blocks_is_found_before_and_after_the_first_call():
    model = TinyDiT(depth=2)
    options = SPARSE | {"schedule.steps": 3, "schedule.branches": 1}
    for block in model.blocks:
        block.compile(backend="chipmunk", options=options)
    assert chipmunk_fx.summary(model).phases == {}
    run(model, calls(TIMES))
    assert chipmunk_fx.summary(model).phases == PHASES and len(chipmunk_fx.summary(model).sites) == 4


def test_before_the_first_call_a_summary_is_empty():
    summary = chipmunk_fx.summary(compiled(TinyDiT()))
    assert (summary.phases, summary.sites, summary.flops_ratio, summary.cache_bytes) == ({}, (), 1.0, 0)
    assert "no call has reached the backend" in str(summary)


def test_a_model_that_never_reached_the_backend_is_reported_so():
    model = compiled(TinyDiT())
    with torch.compiler.set_stance("force_eager"):
        run(model, calls(TIMES))
    assert "no call has reached the backend" in str(chipmunk_fx.summary(model))


def test_a_model_that_is_not_ours():
    plain = TinyDiT()
    others: list[Any] = [plain, torch.compile(plain, backend="eager"), nn.Linear(2, 2)]
    for model in others:
        for look in (chipmunk_fx.summary, chipmunk_fx.reset, lambda m: chipmunk_fx.generation(m).__enter__()):
            with pytest.raises(NotCompiledError, match="torch.compile"):
                look(model)


def test_an_unknown_key_is_answered_with_those_there_are():
    model = compiled(TinyDiT())
    with chipmunk_fx.generation(model, key="request-7"):
        run(model, [CALL])
    with pytest.raises(KeyError, match="request-7"):
        chipmunk_fx.summary(model, key="request-8")


def test_a_summary_tells_work_memory_and_sites():
    model = compiled(TinyDiT(depth=2), schedule__refresh_every=3)
    run(model, calls((900, 800, 700, 600, 500)))
    summary = chipmunk_fx.summary(model)
    assert 0.3 < summary.flops_ratio < 0.9
    assert [(s.name, s.kind) for s in summary.sites] == [
        (f"blocks.{i}", k) for i in (0, 1) for k in ("attention", "mlp")
    ]
    assert all(s.phases == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"]} for s in summary.sites)
    assert all(0 < s.density < 0.5 and s.cache_bytes > 0 for s in summary.sites)
    text = str(summary)
    assert "blocks.1" in text and "RssRs" in text and "% of dense" in text


def test_exempt_sites_are_dense_in_a_summary():
    model = compiled(TinyDiT(depth=2), attention__dense_layers=1, mlp__enabled=False)
    run(model, calls(TIMES))
    sites = chipmunk_fx.summary(model).sites
    assert [s.phases[0][1] for s in sites] == ["dense", "dense", "sparse", "dense"]
    assert [s.status for s in sites] == ["dense", "dense", "rewritten", "dense"] and sites[1].reason


def test_the_share_of_work_falls_with_the_density():
    ratios = []
    for density in (0.05, 0.4, 1.0):
        model = compiled(TinyDiT(), attention__density=density, mlp__density=density)
        run(model, calls(TIMES))
        ratios.append(chipmunk_fx.summary(model).flops_ratio)
    assert ratios == sorted(ratios) and ratios[0] < 0.8 and ratios[-1] >= 1


# Explaining


def test_explain_lists_every_site():
    report = chipmunk_fx.explain(TinyDiT(depth=2), *CALL[:2], text=CALL[2], config=SPARSE)
    assert [(s.name, s.kind, s.form, s.accepted, s.status) for s in report.sites] == [
        (f"blocks.{i}", kind, form, True, "rewritten")
        for i in (0, 1)
        for kind, form in (("attention", "self"), ("mlp", "gelu"))
    ]
    assert report.sites[0].shape == (1, 2, 72, 72, 16) and report.sites[0].where.startswith("models.py:")
    assert (report.timestep, report.latents, report.text) == ("timestep", "latents", ("text",))
    assert report.count("attention") == report.count("mlp", status="rewritten") == 2
    assert report.count("mlp", status="dense") == 0
    assert 0.5 < report.coverage < 1 and "conv2d" in report.geometry
    assert "blocks.1" in str(report) and "2 of 2 attention sites rewritten" in str(report)
    assert json.loads(report.to_json())["sites"][0]["name"] == "blocks.0"


def test_explain_counts_accepted_sites_whatever_the_gate_decides():
    report = chipmunk_fx.explain(TinyDiT(depth=3), *CALL)
    assert report.count("attention") == report.count("attention", status="dense") == 3
    assert [s.reason for s in report.sites if s.kind == "attention"][0].endswith("(attention.dense_layers)")


def test_explain_lists_what_is_refused():
    (site,) = chipmunk_fx.explain(Cross(), torch.randn(1, 24, 16), torch.randn(1, 8, 16)).sites
    assert (site.accepted, site.status, site.form) == (False, "dense", "cross") and "cross attention" in site.reason


def test_explain_says_what_becomes_of_steps_without_a_timestep():
    class Counted(TinyDiT):
        def forward(self, latents, number, text):
            return super().forward(latents, torch.full((1,), number), text)

    report = chipmunk_fx.explain(Counted(), CALL[0], 900, CALL[2])
    assert report.timestep is None
    assert "timestep: not found (calls are counted, by schedule.steps and schedule.branches" in str(report)


def test_latents_in_a_list_are_told_from_text():
    class Listed(TinyDiT):
        def forward(self, latents, timestep, text):
            return list(super().forward(torch.stack(latents), timestep, text))

    steps = [([*latents], *others) for latents, *others in calls(TIMES, batch=2)]
    assert "latents: latents.0, latents.1; text: text;" in str(chipmunk_fx.explain(Listed(), *steps[0]))
    model = compiled(Listed())
    run(model, steps)
    assert chipmunk_fx.summary(model).phases == PHASES


def test_explain_refuses_unknown_kinds():
    report = chipmunk_fx.explain(TinyDiT(), *CALL)
    for arguments in (("linear",), ("mlp", "sparse")):
        with pytest.raises(ValueError, match="attention"):
            report.count(*arguments)


def test_explain_takes_settings_in_every_form(tmp_path: Path):
    path = tmp_path / "settings.yml"
    config = Config.from_options(SPARSE)
    path.write_text(config.to_yaml())
    for given in (SPARSE, config, str(path), path):
        assert chipmunk_fx.explain(TinyDiT(), *CALL, config=given).count("attention", status="rewritten") == 1


def test_explain_raises_config_errors_itself():
    for config in ({"attention.density": 2}, {"tokens.grid": (1, 7, 7)}):
        for model in (TinyDiT(), Broken()):
            with pytest.raises(ConfigError):
                chipmunk_fx.explain(model, *CALL, config=config)
    with pytest.raises(ConfigError, match="config = 3 is not allowed"):
        chipmunk_fx.explain(TinyDiT(), *CALL, config=3)


def test_explain_of_a_model_whose_graph_breaks_sees_all_pieces():
    report = chipmunk_fx.explain(Broken(depth=2), *CALL, config=SPARSE)
    assert report.count("attention") == report.count("mlp") == 4
    assert "breaks into 2 pieces" in report.notes[-1]


def test_explain_leaves_nothing_behind():
    """It can be asked as often as one likes, and the model compiles after it."""
    model = TinyDiT()
    for _ in range(10):
        assert chipmunk_fx.explain(model, *CALL, config=SPARSE).count("attention") == 1
    ours = chipmunk(model, options=EXACT)
    assert chipmunk_fx.explain(ours, *CALL).count("attention") == 1
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_explain_of_a_model_that_fails_raises_what_the_model_raises():
    class Failing(TinyDiT):
        def forward(self, *args):
            raise ZeroDivisionError("from the model")

    with pytest.raises(Exception, match="from the model"):
        chipmunk_fx.explain(Failing(), *CALL)


def test_settings_may_be_changed_between_compilations():
    model = TinyDiT()
    for every in (1, 2):
        ours = compiled(model, schedule__refresh_every=every)
        run(ours, calls(TIMES))
        expected = ["refresh"] * 3 if every == 1 else ["refresh", "sparse", "refresh"]
        assert chipmunk_fx.summary(ours).phases == chipmunk_fx.summary(model).phases == {0: expected}


def test_more_option_sets_than_dynamo_keeps_are_reported_as_not_reached():
    models = [TinyDiT(seed=seed) for seed in range(12)]
    reached = []
    for seed, model in enumerate(models):
        ours = chipmunk(model, options=EXACT | {"seed": seed})
        assert_same(run(ours, calls(TIMES[:1])), run(model, calls(TIMES[:1])))
        reached.append(bool(chipmunk_fx.summary(ours).phases))
        if not reached[-1]:
            assert "no call has reached the backend" in str(chipmunk_fx.summary(ours))
    assert reached[0] and not reached[-1]


def test_inputs_on_which_the_model_was_not_compiled():
    """Another number of text tokens, no text at all, a batch, in any order."""
    model = TinyDiT()
    ours = chipmunk(model, options=EXACT)
    mixes = [
        [call[:2] for call in calls(TIMES)],
        calls(TIMES, [words(1, 3)]),
        calls(TIMES, batch=2),
        [(noise(5, 24), *call[1:]) for call in calls(TIMES, [words(2, 11)])],
        [call[:2] for call in calls(TIMES)],
    ]
    for steps in mixes:
        assert_same(run(ours, steps), run(model, steps))


@torch.no_grad()
@torch.no_grad()
def test_a_graph_that_breaks_the_analysis_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_):
        raise KeyError("a node unlike any other")

    monkeypatch.setattr("chipmunk_fx.backend.find", broken)
    model = TinyDiT(depth=1)
    torch.testing.assert_close(compiled(model)(*CALL[:2], text=CALL[2]), model(*CALL[:2], text=CALL[2]))
    assert any("its analysis failed (KeyError: 'a node unlike any other')" in m for m in warnings_of(caplog))
