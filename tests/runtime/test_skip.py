"""Skipped steps: the blocks are left out, and what they added last is added again."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.config import patch
from torch._inductor.utils import run_and_get_code

import chipmunk_fx
from chipmunk_fx.runtime import variants
from tests.runtime.models import (
    Call,
    TinyDiT,
    assert_same,
    calls,
    chipmunk,
    compiled,
    exactly,
    identical,
    noise,
    run,
    words,
)

TIMES = (900, 700, 500, 300, 100)
ALONE: dict[str, Any] = {"attention__enabled": False, "mlp__enabled": False}


def phases(model: Any) -> dict[int, list[str]]:
    return chipmunk_fx.summary(model).phases


def residual(model: TinyDiT, call: tuple[Tensor, ...]) -> Tensor:
    """What the blocks add to the stream."""
    streams: list[Tensor] = []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0])),
        model.blocks[-1].register_forward_hook(lambda _, args, out: streams.append(out)),
    ]
    run(model, [call])
    for hook in hooks:
        hook.remove()
    return streams[1] - streams[0]


class Adding(nn.Module):
    """In place of all blocks."""

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept


@pytest.mark.parametrize("alone", [True, False])
def test_a_skipped_step_adds_the_last_residual(alone: bool):
    model, adding, inputs = TinyDiT(depth=3), Adding(), calls(TIMES)
    model.blocks = nn.ModuleList([adding])
    ours = exactly(TinyDiT(depth=3), schedule__skip_steps=[1, 3, 4], **(ALONE if alone else {}))
    got = run(ours, inputs)
    dense = [run(TinyDiT(depth=3), [call])[0] for call in inputs]
    assert_same([got[0], got[2]], [dense[0], dense[2]])
    for step, source in ((1, 0), (3, 2), (4, 2)):
        adding.kept = residual(TinyDiT(depth=3), inputs[source])
        assert_same([got[step]], run(model, [inputs[step]]))
        assert not torch.allclose(got[step], dense[step], atol=1e-4)
    first, second = ("dense", "dense") if alone else ("refresh", "sparse")
    assert phases(ours) == {0: [first, "skip", second, "skip", "skip"]}


def test_nothing_of_the_blocks_runs(monkeypatch: pytest.MonkeyPatch):
    graphs: list[fx.GraphModule] = []
    lower = variants.lower

    def noting(module: fx.GraphModule, *rest: Any, **patches: Any) -> Any:
        graphs.append(module)
        return lower(module, *rest, **patches)

    monkeypatch.setattr(variants, "lower", noting)
    ours = compiled(TinyDiT(depth=3), schedule__skip_steps=[1])
    run(ours, calls(TIMES[:2]))
    computed, skipped = ([n.target for n in g.graph.nodes if n.op == "call_function"] for g in graphs)
    aten, ops = torch.ops.aten, torch.ops.chipmunk
    assert computed.count(ops.region_store.default) == 1 and skipped.count(ops.region_add.default) == 1
    assert ops.attention_refresh.default in computed
    assert not any(t in skipped for t in (ops.attention_sparse.default, aten.scaled_dot_product_attention.default))
    # context and time embeddings enter the blocks; of the output, one
    assert skipped.count(aten.linear.default) == 3


def test_caches_are_left_alone():
    """A sparse step after skipped ones is what it would have been without them."""
    inputs = calls(TIMES)
    fixed = {"attention__random_density": 0.0, "mlp__random_density": 0.0}  # drawn by the step's number
    ours = compiled(TinyDiT(depth=2), schedule__skip_steps=[1, 2], **fixed)
    got = run(ours, inputs)
    other = compiled(TinyDiT(depth=2), **fixed)
    want = run(other, [inputs[0], inputs[3], inputs[4]])
    assert phases(ours) == {0: ["refresh", "skip", "skip", "sparse", "sparse"]}
    assert identical([got[0], got[3], got[4]], want)


def test_a_refresh_that_falls_on_a_skipped_step_is_made_up_for():
    ours = compiled(TinyDiT(), schedule__skip_steps=[2], schedule__refresh_every=2)
    run(ours, calls(TIMES))
    assert phases(ours) == {0: ["refresh", "sparse", "skip", "refresh", "refresh"]}


def test_branches_and_generations_have_residuals_of_their_own():
    model, texts = TinyDiT(depth=2), [words(1), words(2)]
    ours = exactly(model, schedule__skip_steps=[1], **ALONE)
    apart = []
    for text in texts:
        chipmunk_fx.reset(ours)
        apart.append(run(ours, calls(TIMES[:3], [text])))
    together = run(ours, calls(TIMES[:3], texts))
    assert phases(ours) == {branch: ["dense", "skip", "dense"] for branch in (0, 1)}
    assert identical(together[0::2], apart[0]) and identical(together[1::2], apart[1])


def test_the_first_step_is_never_skipped():
    ours = exactly(TinyDiT(), schedule__skip_steps=[0, 1])
    run(ours, calls(TIMES[:3]))
    assert phases(ours) == {0: ["refresh", "skip", "sparse"]}


def test_the_work_of_skipped_steps():
    ours = exactly(TinyDiT(depth=4), schedule__skip_steps=[1, 2, 3, 4], **ALONE)
    run(ours, calls(TIMES))
    summary = chipmunk_fx.summary(ours)
    assert 0.2 < summary.flops_ratio < 0.3
    assert all(site.phases == {0: ["dense", *["skip"] * 4]} for site in summary.sites)


def test_blocks_compiled_one_by_one_skip_nothing_and_say_so(caplog: pytest.LogCaptureFixture):
    model = TinyDiT(depth=2)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(
            backend="chipmunk",
            options={"lowering": "eager", "gate": "off", "schedule.steps": 5, "schedule.branches": 1,
                     "schedule.skip_steps": [1], "attention.dense_layers": 0, "mlp.dense_layers": 0},
        )  # fmt: skip
    run(model, calls(TIMES))
    assert phases(model) == {0: ["refresh", *["sparse"] * 4]}
    assert any("no step is skipped" in record.message for record in caplog.records)


def test_another_resolution():
    model = TinyDiT(depth=2)
    ours = exactly(model, schedule__skip_steps=[1])
    for side in (16, 24, 32, 16):
        got, want = run(ours, calls(TIMES[:3], side=side)), run(model, calls(TIMES[:3], side=side))
        assert_same([got[0], got[2]], [want[0], want[2]])
        assert phases(ours) == {0: ["refresh", "skip", "sparse"]}


@pytest.mark.parametrize(
    ("setting", "want"),
    [({"skip_steps": [1]}, ["dense", "skip", "dense"]), ({"skip_threshold": 1e6}, ["dense", "dense", "skip"])],
)
def test_with_inductor(setting: dict[str, Any], want: list[str]):
    torch._dynamo.reset()
    options = {"attention.enabled": False, "mlp.enabled": False} | {f"schedule.{k}": v for k, v in setting.items()}
    ours, inputs = chipmunk(TinyDiT(depth=2), options=options), calls(TIMES[:3])
    other = exactly(TinyDiT(depth=2), **{f"schedule__{k}": v for k, v in setting.items()}, **ALONE)
    with patch(fx_graph_cache=False):  # whose graphs come without their code
        done, code = run_and_get_code(run, ours, inputs)
    assert_same(done, run(other, inputs))
    assert phases(ours) == {0: want}
    computed, skipped = (next(text for text in code if op in text) for op in ("region_store", "region_add"))
    assert computed.count("addmm(") == skipped.count("addmm(") + 2 * 4, "four linears a block"
    assert "scaled_dot_product" in computed and "scaled_dot_product" not in skipped


def changes(model: TinyDiT, inputs: list[Call]) -> list[float]:
    """How far what the blocks add has moved from each call to the next."""
    added = [residual(model, call) for call in inputs]
    return [float((b - a).abs().sum() / a.abs().sum()) for a, b in pairwise(added)]


@pytest.mark.parametrize("alone", [True, False])
def test_steps_are_skipped_while_the_blocks_add_nearly_the_same(alone: bool):
    """Skipped: the steps for which the rate of change between the last two computed ones promises less than allowed."""
    times = (9.0, 8.99, 8.98, 8.97, 5.0, 4.99, 4.98, 4.97)
    inputs = [(noise(0), torch.full((1,), time), words()) for time in times]
    moved = changes(TinyDiT(depth=2), inputs)
    threshold = 2.5 * moved[0]
    assert threshold < moved[3] / 3 and 2 * moved[4] < threshold, "only the jump from 8.97 to 5 moves far"
    ours = exactly(TinyDiT(depth=2), schedule__skip_threshold=threshold, **(ALONE if alone else {}))
    got = run(ours, inputs)
    first, then = ("dense", "dense") if alone else ("refresh", "sparse")
    # two steps at the first rate, then one computed over the jump, and another to see that all is steady again
    assert phases(ours) == {0: [first, then, "skip", "skip", then, then, "skip", "skip"]}
    dense = run(TinyDiT(depth=2), inputs)
    assert_same([got[i] for i in (0, 1, 4, 5)], [dense[i] for i in (0, 1, 4, 5)])


def test_what_is_promised_is_that_of_the_call_in_hand():
    """Branches, generations and streams of their own: nothing is skipped at a threshold of 0, all that may be at a huge one."""
    texts = [words(1), words(2)]
    never = exactly(TinyDiT(depth=2), schedule__skip_threshold=0.0)
    run(never, calls(TIMES, texts))
    assert phases(never) == {b: ["refresh", *["sparse"] * 4] for b in (0, 1)}
    ever = exactly(TinyDiT(depth=2), schedule__skip_threshold=1e6)
    for _ in range(2):
        chipmunk_fx.reset(ever)
        run(ever, calls(TIMES, texts))
        assert phases(ever) == {b: ["refresh", "sparse", *["skip"] * 3] for b in (0, 1)}


def test_the_change_of_what_is_added():
    start, stop = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    kept, change = torch.zeros(2, 5, 8), torch.zeros(1)
    torch.ops.chipmunk.region_store(start, stop, kept, change)
    assert change.item() == torch.inf and torch.equal(kept, stop - start)
    torch.ops.chipmunk.region_store(start, start + 1.25 * (stop - start), kept, change)
    assert change.item() == pytest.approx(0.25, rel=1e-5)
    torch.ops.chipmunk.region_store(start, stop, kept, None)
    assert torch.equal(kept, stop - start)


def test_dense_steps_leave_residuals_and_no_caches():
    """Skipped after a dense step: what that one added. Sparse: on top of the last refresh, as if it had not been."""
    inputs, fixed = calls(TIMES), {"attention__random_density": 0.0, "mlp__random_density": 0.0}
    ours = compiled(TinyDiT(depth=2), schedule__dense_steps=[0, 3], schedule__skip_steps=[1], **fixed)
    got, dense = run(ours, inputs), run(TinyDiT(depth=2), inputs)
    assert phases(ours) == {0: ["dense", "skip", "refresh", "dense", "sparse"]}
    assert_same([got[i] for i in (0, 2, 3)], [dense[i] for i in (0, 2, 3)])
    alone = exactly(TinyDiT(depth=2), schedule__skip_steps=[1], **ALONE)
    assert_same(got[1:2], run(alone, inputs)[1:2])
    other = compiled(TinyDiT(depth=2), **fixed)
    assert identical(got[4:], run(other, [inputs[2], inputs[4]])[1:])
    assert not torch.allclose(got[4], dense[4], atol=1e-5)


def test_dense_steps_without_skipped_ones():
    ours = compiled(TinyDiT(depth=2), schedule__dense_steps=[0, 1])
    got, dense = run(ours, calls(TIMES)), run(TinyDiT(depth=2), calls(TIMES))
    assert phases(ours) == {0: ["dense", "dense", "refresh", "sparse", "sparse"]}
    assert_same(got[:3], dense[:3])
    assert chipmunk_fx.summary(ours).fallbacks == ()


def test_a_parameter_replaced_before_a_dense_step():
    """The caches are new there; the sparse step that was due has nothing to build on."""
    model, inputs = TinyDiT(depth=2), calls(TIMES)
    ours = compiled(model, schedule__dense_steps=[2], schedule__skip_steps=[4])
    run(ours, inputs[:2])
    qkv = model.blocks[1].qkv
    qkv.weight = nn.Parameter(qkv.weight.detach() + 0.1)
    got = run(ours, inputs[2:4])
    assert phases(ours) == {0: ["refresh", "sparse", "dense", "refresh"]}
    assert_same(got, run(model, inputs[2:4]))


class Refined(TinyDiT):
    """Image and text each have a block of their own before they are joined, as in Z-Image."""

    def __init__(self, depth: int = 1, seed: int = 0) -> None:
        super().__init__(depth, seed)
        made = TinyDiT(depth=2, seed=1)
        self.refiners, self.texts = made.blocks[:1], made.blocks[1:]

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time((timestep[:, None] * torch.arange(1, 33)).sin())[:, None]
        both = torch.cat([self.texts[0](self.context(text)), self.refiners[0](x)], 1)
        x = nn.utils.rnn.pad_sequence(list(both), batch_first=True)  # through which no stream is followed
        for block in self.blocks:
            x = block(x)
        x = self.out(x)[:, text.shape[1] :].unflatten(1, (8, 8)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def test_refiners_before_the_longest_stack_are_computed_on_every_step():
    model = Refined(depth=2)
    report = chipmunk_fx.explain(model, *calls(TIMES)[0])
    assert any(note.startswith("blocks that can be skipped: ") for note in report.notes), report.notes
    ours = exactly(Refined(depth=2), schedule__skip_steps=[1, 3])
    still = [calls(TIMES)[0]] * 4
    got = run(ours, still)
    assert_same(got, run(model, still))
    assert phases(ours) == {0: ["refresh", "skip", "sparse", "skip"]}
    chipmunk_fx.reset(ours)
    inputs = calls(TIMES)[:3]
    refreshed, skipped, _ = run(ours, inputs)
    dense = run(model, inputs)
    assert_same([refreshed], dense[:1])
    assert not torch.allclose(skipped, refreshed, atol=1e-4) and not torch.allclose(skipped, dense[1], atol=1e-4)
