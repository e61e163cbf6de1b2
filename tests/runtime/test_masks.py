"""Padded keys: never attended, never selected, dropped where they stand at an end; other masks stay dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk_fx
from chipmunk_fx.ops import attention
from chipmunk_fx.runtime import known, registry
from tests.graph.capturing import captured
from tests.runtime.models import HEADS, TinyDiT, assert_same, calls, compiled, exactly, identical, run, words

TIMES = (900, 700, 500, 300)
PHASES = {0: ["refresh", "sparse", "sparse", "sparse"]}
Spell = Callable[[Tensor], Tensor]


def both(present: Tensor) -> Tensor:
    """Of keys and of rows."""
    keys = present[:, None, None].repeat(1, 1, present.shape[1], 1)
    return (keys & keys.transpose(2, 3)).bool()


SPELLINGS: dict[str, Spell] = {
    "boolean": lambda present: present[:, None, None],
    "expanded": lambda present: present[:, None, None].expand(-1, HEADS, present.shape[1], -1),
    "added": lambda present: torch.zeros(present.shape).masked_fill(~present, -torch.inf)[:, None, None],
    "for every head": lambda present: present[:, None].repeat_interleave(HEADS, 0).view(len(present), HEADS, 1, -1),
    "for every row": lambda present: present[:, None, None].repeat(1, HEADS, present.shape[1], 1),
    "of rows too": both,
    "added -10000": lambda present: (1.0 - present.float())[:, None, None] * -10000.0,
}


class Masked(TinyDiT):
    """`timestep`, `present` bool [B, T]: text tokens that are no padding. Text stands last, or first."""

    def __init__(
        self, spell: Spell = SPELLINGS["boolean"], last: bool = True, depth: int = 2, attend: Any = None
    ) -> None:
        super().__init__(depth)
        self.spell, self.last, self.attend = spell, last, attend or F.scaled_dot_product_attention

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, present: Tensor) -> Tensor:  # pyright: ignore
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time(timestep[:, None].sin() * torch.ones(1, 32))[:, None]
        image = torch.ones(b, x.shape[1], dtype=torch.bool)
        order = [1, 0] if self.last else [0, 1]
        x = torch.cat([(self.context(text), x)[i] for i in order], 1)
        mask = self.spell(torch.cat([(present, image)[i] for i in order], 1))
        for block in self.blocks:
            q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + block.proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        x = x[:, :-8] if self.last else x[:, 8:]
        x = self.out(x).unflatten(1, (h // 2, w // 2)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 4, h, w)


def steps(counts: tuple[int, ...] = (5,), times: tuple[int, ...] = TIMES) -> list[Any]:
    """The calls of a generation in which the entries of the batch have so many text tokens, of 8."""
    present = torch.arange(8) < torch.tensor(counts).unsqueeze(1)
    return [(*call, present) for call in calls(times, batch=len(counts))]


def by_numpy(mask: Tensor, new: Tensor) -> None:
    mask.numpy()[:] = new.numpy()


def spans(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What is found of each mask."""
    seen: list[list[int]] = []
    make = known._padding

    def noting(*args: Any) -> known.Padding:
        seen.append((padding := make(*args)).span.tolist())
        return padding

    monkeypatch.setattr(known, "_padding", noting)
    return seen


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("last", [True, False], ids=["text last", "text first"])
@pytest.mark.parametrize("counts", [(5,), (8, 3), (4, 4)], ids=str)
def test_every_phase_is_right(spelling: str, last: bool, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    model, found = Masked(SPELLINGS[spelling], last), spans(monkeypatch)
    ours = exactly(model, attention__dense_layers=1)
    assert_same(run(ours, steps(counts)), run(model, steps(counts)))
    assert chipmunk_fx.summary(ours).phases == PHASES
    assert [s.status for s in chipmunk_fx.summary(ours).sites if s.kind == "attention"] == ["dense", "rewritten"]
    image = 64
    whole = [0, image + counts[0]] if last and len(set(counts)) == 1 else [-1, -1]
    assert found == [whole], "one look at the mask, which all layers share"


WRITTEN_OUT: dict[str, tuple[str, Any]] = {
    "added": ("added", lambda q, k, v, mask: (0.25 * (q @ k.mT) + mask).softmax(-1) @ v),
    "filled": ("boolean", lambda q, k, v, mask: (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v),
    "filled where zero": (
        "boolean",
        lambda q, k, v, mask: torch.einsum(
            "bhij,bhjd->bhid", (0.25 * q @ k.mT).masked_fill(mask == 0, -1e9).softmax(-1), v
        ),
    ),
}


@pytest.mark.parametrize("spelling", WRITTEN_OUT)
@pytest.mark.parametrize("counts", [(5,), (8, 3)], ids=str)
def test_attention_written_out(spelling: str, counts: tuple[int, ...]):
    name, attend = WRITTEN_OUT[spelling]
    model = Masked(SPELLINGS[name], attend=attend)
    ours = exactly(model)
    assert_same(run(ours, steps(counts)), run(model, steps(counts)))
    assert chipmunk_fx.summary(ours).phases == PHASES
    assert [s.status for s in chipmunk_fx.summary(ours).sites if s.kind == "attention"] == ["rewritten"] * 2


@pytest.mark.parametrize("last", [True, False], ids=["text last", "text first"])
def test_padded_keys_are_never_read(last: bool):
    """What stands in the padding changes nothing of the picture, bit for bit."""
    ours = compiled(Masked(last=last, depth=1), attention__density=0.3, mlp__enabled=False)
    results = []
    for seed in (1, 2):
        chipmunk_fx.reset(ours)
        texts = words(7)
        texts[:, 5:] = words(seed)[:, 5:]
        results.append(run(ours, [(latents, time, texts, present) for latents, time, _, present in steps()]))
    assert chipmunk_fx.summary(ours).phases == PHASES
    density = next(s.density for s in chipmunk_fx.summary(ours).sites if s.kind == "attention")
    assert density < 0.6
    assert identical(*results)


def test_density_is_a_share_of_the_valid_keys():
    """64 + 2 valid keys: 33 by mass, 1 at random and the 2 of text, rounded up to 48; of all 72 it would be 64."""
    ours = compiled(Masked(), attention__density=0.5)
    run(ours, steps((2,)))
    site = next(s for s in chipmunk_fx.summary(ours).sites if s.kind == "attention")
    assert site.density == 48 / 66


def test_another_mask_within_a_generation_is_followed():
    model = Masked()
    ours = exactly(model)
    inputs = [*steps((5,))[:2], *steps((3,))[2:]]
    inputs = [(*call[:2], words(), call[3]) for call in inputs]
    assert_same(run(ours, inputs), run(model, inputs))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


@pytest.mark.parametrize("write", [Tensor.copy_, by_numpy, lambda mask, new: mask.data.copy_(new)])
def test_a_mask_written_in_place_is_followed(write: Callable[[Tensor, Tensor], Any]):
    model = Masked()
    ours, inputs = exactly(model), steps((5,))
    shared = inputs[0][3]
    for index, (latents, time, text, _) in enumerate(inputs):
        if index == 2:
            write(shared, torch.arange(8) < 2)
        assert_same(run(ours, [(latents, time, text, shared)]), run(model, [(latents, time, text, shared)]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


def test_a_mask_that_shows_no_new_version_is_asked_for_anew_by_every_generation(monkeypatch: pytest.MonkeyPatch):
    """Of a mask that is not compared, as on a GPU."""
    monkeypatch.setattr(known.Stamp, "fits", lambda stamp, value: True)
    model = Masked()
    ours, inputs = exactly(model), steps((5,))
    for _ in range(2):
        assert_same(run(ours, inputs), run(model, inputs))
        inputs[0][3].data.copy_(torch.arange(8) < 2)
        inputs = [(*call[:3], inputs[0][3]) for call in inputs]
        chipmunk_fx.reset(ours)


def test_a_bias_is_no_padding():
    model = Masked(lambda present: present.float()[:, None, None])
    ours = compiled(model)
    assert identical(run(ours, steps()), run(model, steps()))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["dense"] * 4}
    assert all("more than leave keys out" in fallback.reason for fallback in summary.fallbacks)


def test_an_entry_without_keys_runs_dense():
    class Alone(Masked):
        """Attends to text alone."""

        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, present: Tensor) -> Tensor:  # pyright: ignore
            self.spell = lambda all_present: (all_present & (torch.arange(72) >= 64))[:, None, None]
            return super().forward(latents, timestep, text, present)

    model = Alone()
    ours = exactly(model)
    inputs = steps((0, 4))
    assert_same(run(ours, inputs), run(model, inputs))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["dense"] * 4} and "without keys" in summary.fallbacks[0].reason


OTHERS: dict[str, tuple[Spell, str]] = {
    "by row": (lambda present: (present[:, None] | present[:, :, None])[:, None], "row to row"),
    "written to": (lambda present: both(present).index_fill_(3, torch.zeros(1, dtype=torch.long), True), "row to row"),
    "by head": (lambda present: torch.stack([present, ~present], 1)[:, :, None], "head to head"),
    "rank 3": (lambda present: present[:, None], "key padding is"),
}


@pytest.mark.parametrize("spelling", OTHERS)
def test_other_masks_stay_dense(spelling: str):
    spell, reason = OTHERS[spelling]
    model = Masked(spell)
    inputs = steps()
    sites = [s for s in chipmunk_fx.explain(model, *inputs[0]).sites if s.kind == "attention"]
    assert [(s.accepted, s.status) for s in sites] == [(True, "dense")] * 2
    assert all(reason in s.reason for s in sites)
    assert_same(run(exactly(model), inputs), run(model, inputs))


def test_a_mask_that_the_model_computes_stays_dense():
    class Computed(Masked):
        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, present: Tensor) -> Tensor:  # pyright: ignore
            return super().forward(latents, timestep, text, self.context(text).sum(-1) > 0)

    site = next(s for s in chipmunk_fx.explain(Computed(), *steps()[0]).sites if s.kind == "attention")
    assert site.status == "dense" and "come out of linear" in site.reason


def test_a_mask_that_is_drawn_at_random_is_no_padding():
    """The model draws it anew at every call, and nobody else may take numbers from its generator."""

    def drawn(present: Tensor) -> Tensor:
        return (torch.rand(present.shape) > 0.3)[:, None, None]

    ours, dense = exactly(Masked(drawn)), Masked(drawn)
    for step, call in enumerate(steps()):
        torch.manual_seed(step)
        (want,), state = run(dense, [call]), torch.get_rng_state()
        torch.manual_seed(step)
        assert_same(run(ours, [call]), [want])
        assert torch.equal(torch.get_rng_state(), state)
    (first, _) = (s for s in chipmunk_fx.explain(Masked(drawn), *steps()[0]).sites if s.kind == "attention")
    assert first.status == "dense" and "drawn at random by rand" in first.reason


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each dense attention saw: 64 + 5 are no padding, of 72."""
    seen: list[int] = []
    attend = attention.attend

    def noting(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(attention, "attend", noting)
    return seen


def test_dense_steps_drop_padded_keys(lengths: list[int]):
    """In the dense layer and in dense calls."""
    ours = compiled(Masked(), attention__dense_layers=1, schedule__branches=2)
    run(ours, steps()[:1])
    assert lengths[0] == 69
    lengths.clear()
    with chipmunk_fx.generation(ours, branch=None):
        run(ours, steps()[:1])
    assert lengths[0] == 69


def test_calls_without_memory_for_caches_drop_them_too(lengths: list[int]):
    ours = compiled(Masked())
    run(ours, steps()[:1])
    (session,) = registry.sessions(ours)
    session.limit = lambda place: 0  # bytes
    lengths.clear()
    with chipmunk_fx.generation(ours, key="another"):
        run(ours, steps()[:1])
    assert "exceed" in chipmunk_fx.summary(ours).fallbacks[0].reason and set(lengths) == {69}


def test_dynamic_shapes():
    model = Masked()
    torch._dynamo.reset()
    ours = exactly(model)
    with torch._dynamo.config.patch(assume_static_by_default=False, automatic_dynamic_shapes=True):
        for side in (16, 24, 32):
            present = torch.arange(8)[None] < 5
            inputs = [(*call, present) for call in calls(TIMES, side=side)]
            assert_same(run(ours, inputs), run(model, inputs))
            assert chipmunk_fx.summary(ours).phases == PHASES


class Chosen(Masked):
    """The user wants the plain kernel."""

    def forward(self, *inputs: Tensor) -> Tensor:  # pyright: ignore
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*inputs)


def test_the_kernel_that_the_user_chose_is_kept():
    seen = captured(Chosen(), *steps()[0])
    sites = [s for s in seen.plan(gate="off").sites if s.kind == "attention"]
    assert [s.operands.sdpa for s in sites] == ["MATH", "MATH"]  # pyright: ignore


class Local(nn.Module):
    """A cross attention with a kernel of its own beside a self attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny, self.q, self.kv = TinyDiT(), nn.Linear(32, 32), nn.Linear(16, 64)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.tiny(latents, timestep, text)
        q = self.q(x.flatten(2).transpose(1, 2).repeat(1, 1, 8)).unflatten(-1, (2, 16)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v)
        return x + y.mean() * 1e-3


def test_the_kernel_of_an_attention_that_is_left_alone_is_kept(monkeypatch: pytest.MonkeyPatch):
    """In rewritten graphs too."""
    used: list[str] = []
    chosen = __import__("chipmunk_fx.graph.kept_attention", fromlist=["x"])._chosen_attention

    def noting(allowed: str, *args: Any, **kwargs: Any) -> Tensor:
        used.append(allowed)
        return chosen(allowed, *args, **kwargs)

    monkeypatch.setattr("chipmunk_fx.graph.kept_attention._chosen_attention", noting)
    model = Local()
    ours = exactly(model)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours).phases == PHASES and used == ["MATH"] * 4
