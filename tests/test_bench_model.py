"""Measuring whole models: what is run, what is counted, what is printed. Times of tiny models say nothing and are not read."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.profiler import profile

from chipmunk_fx import bench_model, bench_subjects
from chipmunk_fx.bench_dense import kernels, preferred, through_op
from chipmunk_fx.bench_measure import (
    SKIPPED,
    Figures,
    Request,
    Way,
    dense_ways,
    extrapolated,
    measure,
    sparse_ways,
    steps_by_phase,
)
from chipmunk_fx.bench_subjects import SUBJECTS, Subject, build, few, ignore_masks, own
from chipmunk_fx.errors import BenchError, ConfigError, UsageError
from tests.runtime.models import SPARSE, TinyDiT, noise, one_thread, words

CPU = torch.device("cpu")
TINY_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
    "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    return TinyDiT(depth=2), {"latents": noise(), "timestep": torch.tensor([500.0]), "text": words()}


def run(*given: str, factory: Callable[[], Any] = tiny) -> list[Figures]:
    parser = argparse.ArgumentParser()
    bench_model.add_arguments(parser)
    return bench_model.run(parser.parse_args(given), lambda path: factory())


def option(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--option", f"{key}={value}")]


@pytest.fixture(scope="module")
def figures() -> list[Figures]:
    request = Request(SPARSE | {"attention.density": 0.2, "mlp.enabled": False}, rounds=1, eager=True, backend="eager")
    return measure(lambda: own(tiny, CPU), request, CPU)


def test_every_way_goes_through_its_phases(figures: list[Figures]):
    phases = {way.way: set(way.ms) for way in figures}
    assert phases == {
        "uncompiled": {"dense"},
        "dense": {"dense"},
        "sparse": {"refresh", "sparse"},
        "sparse + skip": {"refresh", "sparse", "skip"},
        "skip alone": {"dense", "skip"},
    }
    assert all(value > 0 for way in figures for value in way.ms.values())
    assert not any(way.fallbacks for way in figures)


def test_totals_are_composed_of_the_published_schedule(figures: list[Figures]):
    counted = {way.way: way.phases for way in figures}
    assert counted["dense"] == {"dense": 50}
    assert counted["sparse"] == {"refresh": 5, "sparse": 45}
    assert counted["sparse + skip"] == {"refresh": 5, "sparse": 45 - len(SKIPPED), "skip": len(SKIPPED)}
    assert counted["skip alone"] == {"dense": 50 - len(SKIPPED), "skip": len(SKIPPED)}
    for way in figures:
        assert way.total_is == "composed"
        assert way.total_s == pytest.approx(sum(number * way.ms[phase] for phase, number in way.phases.items()) / 1e3)


def test_densities_and_sites_are_those_of_the_run(figures: list[Figures]):
    sparse = next(way for way in figures if way.way == "sparse")
    assert sparse.sites == {"attention": "2 of 2", "mlp": "0 of 2"}
    assert 0.2 <= sparse.density["attention"] < 0.5 and "mlp" not in sparse.density and sparse.cache_gb > 0
    alone = next(way for way in figures if way.way == "skip alone")
    assert alone.sites["attention"] == "0 of 2" and not alone.density
    assert sparse.shared_gb < sparse.cache_gb and alone.shared_gb == alone.cache_gb > 0


def test_whole_generations_are_measured():
    request = Request(SPARSE | {"schedule.skip_steps": [3, 5]}, steps=6, rounds=1, whole=True, backend="eager")
    found = {way.way: way for way in measure(lambda: own(tiny, CPU), request, CPU)}
    assert {way.total_is for way in found.values()} == {"measured"}
    assert found["sparse + skip"].phases == {"refresh": 1, "sparse": 3, "skip": 2}


def test_a_table(capsys: pytest.CaptureFixture[str]):
    settings = option(SPARSE | {"attention.density": 0.2, "mlp.enabled": False})
    run("any:thing", "--steps", "20", "--rounds", "1", *settings)
    out = capsys.readouterr().out
    assert "dense, ms" in out and "20 steps, s" in out and "composed" in out and "over dense" in out
    assert "sparse: attention 2 of 2 sites sparse, mlp 0 of 2 sites sparse; 2 refresh, 18 sparse" in out
    assert "attention 0.2 + 0.01 random" in out
    assert "skip alone" not in out, "the published list is for 50 steps"


@pytest.mark.full
def test_json_and_a_plot_of_a_named_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    subject = Subject("HunyuanVideoTransformer3DModel", "hunyuan", TINY_HUNYUAN, words=64)
    monkeypatch.setitem(bench_model.SUBJECTS, "hunyuan", subject)
    settings = option(SPARSE | {"memory.offload": "none"})
    words = ("hunyuan", "--size", "64x64x9", "--dtype", "fp32", "--rounds", "1", "--json", "--blocks", "1")
    found = run(*words, "--plot", str(tmp_path / "made" / "bars.png"), *settings)
    written = json.loads(capsys.readouterr().out)
    names = ["dense, as shipped", "dense, mask dropped", "sparse", "sparse + skip", "skip alone"]
    assert [way["way"] for way in written["ways"]] == names and written["blocks"] == 1
    shipped, dropped, *_, skipping, _ = found
    assert written["ways"][3]["over_as_shipped"] == pytest.approx(shipped.total_s / skipping.total_s)
    best = min(shipped.total_s, dropped.total_s)
    assert written["ways"][3]["over_best_dense"] == pytest.approx(best / skipping.total_s)
    assert skipping.sites["attention"] == "2 of 3", "a double block, a single one; the text refiner's is full-masked"
    assert (tmp_path / "made" / "bars.png").stat().st_size > 1000


def test_without_its_mask_a_model_of_words_alone_computes_the_same():
    pytest.importorskip("diffusers")
    built = build(
        Subject("HunyuanVideoTransformer3DModel", "hunyuan", TINY_HUNYUAN, words=5), (64, 64, 9), 1, CPU, torch.float32
    )
    assert built.unpadded is not None and built.unpadded[0]["encoder_hidden_states"].shape[1] == 5
    with torch.no_grad():
        want = built.model(**built.calls[0])[0]
        ignore_masks(built.model)
        torch.testing.assert_close(built.model(**built.unpadded[0])[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "hunyuan", "wan"])
def test_published_shapes_fit_the_real_configuration(name: str):
    """On the meta device, one block of each kind; the weights of the whole model are 12 to 14 billion numbers."""
    pytest.importorskip("diffusers")
    built = build(SUBJECTS[name], None, 1, torch.device("meta"), torch.bfloat16)
    latents = built.calls[0]["hidden_states"]
    assert len(built.calls) == SUBJECTS[name].calls
    with torch.no_grad():
        assert built.model(**built.calls[-1])[0].shape == latents.shape
    whole = build(SUBJECTS[name], None, None, torch.device("meta"), torch.bfloat16).model
    assert 11e9 < sum(p.numel() for p in whole.parameters()) < 14.5e9


def test_weights_are_drawn_and_norms_are_one():
    pytest.importorskip("diffusers")
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    model = bench_subjects.random_weights("WanTransformer3DModel", small, CPU, torch.bfloat16)
    weights = dict(model.named_parameters())
    assert weights["blocks.0.attn1.norm_q.weight"].eq(1).all()
    assert weights["blocks.0.ffn.net.2.weight"].float().std().item() == pytest.approx(bench_subjects.STD, rel=0.2)
    assert weights["blocks.0.ffn.net.2.weight"].dtype is torch.bfloat16
    assert weights["blocks.0.scale_shift_table"].dtype is torch.float32, "as from_pretrained keeps it"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_what_cannot_be_measured_is_told():
    with pytest.raises(BenchError, match="no model 'fluxx'; there are flux, hunyuan, wan, mochi"):
        run("fluxx")
    with pytest.raises(UsageError, match="write it as NAME=VALUE"):
        run("any:thing", "--option", "attention.density")
    with pytest.raises(ConfigError, match="attention.density"):
        run("any:thing", "--option", "attention.denisty=0.1")
    with pytest.raises(BenchError, match="nothing of this model is understood"):
        run("any:thing", factory=lambda: (nn.Linear(4, 4), {"input": torch.ones(1, 4)}))


def test_steps_are_counted_as_they_would_be_run():
    settings = {"schedule.dense_steps": [0, 1, 6], "schedule.refresh_steps": [2, 5], "schedule.skip_steps": [1, 4]}
    sparse = Way("sparse + skip", "chipmunk", settings, ("dense", "refresh", "sparse", "skip"))
    assert steps_by_phase(sparse, 8) == {"dense": 2, "skip": 2, "refresh": 2, "sparse": 2}
    assert steps_by_phase(Way("skip alone", "chipmunk", settings, ("dense", "skip")), 8) == {"dense": 6, "skip": 2}
    assert steps_by_phase(Way("dense", "inductor", {}, ("dense",)), 8) == {"dense": 8}


def test_all_compiled_ways_are_in_the_mode_that_is_asked_for():
    asked = Request({"inductor.mode": "reduce-overhead"}, eager=True)
    modes = {way.name: way.options.get("inductor.mode") for way in (*dense_ways(asked, True), *sparse_ways(asked))}
    assert modes.pop("uncompiled") is None
    assert len(modes) == 5 and set(modes.values()) == {"reduce-overhead"}


def test_a_whole_model_is_told_from_a_few_blocks():
    """Two of six blocks measured at 9 ms each dense, 3 sparse, 11 refreshing, beside 2 ms that are no blocks."""

    def figures(way: str, ms: dict[str, float], phases: dict[str, int]) -> Figures:
        return Figures(way, "default", ms, phases, 0.0, "composed", 1.0, 5.0, {}, {}, 0.5, 0.1)

    steps = {"refresh": 1, "sparse": 8, "skip": 1}
    found = [
        figures("uncompiled", {"dense": 12.0}, {"dense": 10}),
        figures("dense", {"dense": 20.0}, {"dense": 10}),
        figures("sparse + skip", {"refresh": 24.0, "sparse": 8.0, "skip": 2.0}, steps),
    ]
    uncompiled, dense, skipping = extrapolated(found, blocks=2, whole=6, dense_layers=1)
    assert dense.ms == {"dense": 2 + 6 * 9} and dense.total_s == pytest.approx(0.56)
    assert skipping.ms == {"refresh": 2 + 9 + 5 * 11, "sparse": 2 + 9 + 5 * 3, "skip": 2}
    assert skipping.total_s == pytest.approx((66 + 8 * 26 + 2) / 1e3) and skipping.total_is == "extrapolated"
    assert skipping.cache_gb == pytest.approx(0.1 + 1.0) and skipping.peak_gb is None
    assert uncompiled.ms == {"dense": 2 + 6 * 5}
    with pytest.raises(BenchError, match="leave out --extrapolate"):
        extrapolated(found[:2], blocks=2, whole=6, dense_layers=1)


def test_blocks_are_limited_in_proportion():
    pytest.importorskip("diffusers")
    subject, blocks, whole = few(SUBJECTS["flux"], 2)
    assert (blocks, whole) == (6, 57) and dict(subject.settings)["num_single_layers"] == 4


@pytest.mark.full
def test_a_named_model_is_extrapolated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("diffusers")
    tiny = Subject("HunyuanVideoTransformer3DModel", "hunyuan", TINY_HUNYUAN, words=64)
    monkeypatch.setitem(bench_model.SUBJECTS, "hunyuan", tiny)
    settings = option(SPARSE | {"memory.offload": "none", "attention.dense_layers": 1})
    found = run("hunyuan", "--size", "64x64x9", "--dtype", "fp32", "--rounds", "1", "--extrapolate", "1", *settings)
    assert "4 blocks told from 2" in capsys.readouterr().out
    assert {way.total_is for way in found} == {"extrapolated"}
    assert found[2].sites["attention"] == "2 of 3"


@pytest.mark.parametrize(
    "more", [["any:thing"], ["wan", "--blocks", "1"], ["wan", "--whole"], ["flux", "--option", "mlp.dense_layers=1"]]
)
def test_what_cannot_be_extrapolated(more: list[str]):
    with pytest.raises(BenchError, match="--extrapolate takes"):
        run(*more, "--extrapolate", "1")


def test_no_blocks_tell_nothing():
    with pytest.raises(BenchError, match="--extrapolate takes 1 or more"):
        run("wan", "--extrapolate", "0")


def test_dense_attention_through_the_operator_is_the_same():
    model, inputs = tiny()
    with torch.no_grad():
        expected = model(**inputs)
        compiled = torch.compile(model, backend=through_op("eager"))
        torch.testing.assert_close(compiled(**inputs), expected)
        with profile() as run:
            compiled(**inputs)
    assert sum(event.name == "chipmunk::attention_dense" for event in run.events() or ()) == 2


def test_kernels_of_a_cpu():
    assert kernels(CPU) == ("default",)


def test_what_one_kernel_was_compiled_with_is_not_taken_for_another():
    q, hits = torch.randn(1, 2, 32, 16), []
    with fresh_cache(), torch.no_grad():
        for kernel in ("flash", "cudnn", "cudnn"):
            torch._dynamo.reset()
            counters.clear()
            with preferred(kernel):
                torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q))(q)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 1]
