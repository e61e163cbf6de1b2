"""Branches of guidance that nothing but a mask or a flag tells apart, beside the same text; pictures that take turns."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk_fx
from tests.runtime.models import TinyDiT, calls, compiled, identical, noise, run, words

TIMES = (900, 700, 500, 300)
STEPS = ["refresh", "sparse", "sparse", "sparse"]


class Dropping(nn.Module):
    """Takes a text or, where it is dropped, one of its own; told by a mask, a strength or a flag."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.dit = kind, TinyDiT()
        self.null = nn.Parameter(words(5))

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, drop: Any) -> Tensor:
        if self.kind == "mask":
            text = torch.where(drop[:, None, None], self.null, text)
        elif self.kind == "tokens":
            text = text * drop[..., None]
        elif self.kind == "strength":
            text = text * drop
        elif drop:
            text = self.null.expand(text.shape)
        return self.dit(latents, timestep, text)


DROPS: dict[str, tuple[Any, Any]] = {
    "mask": (torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)),
    "tokens": (torch.ones(1, 8), torch.zeros(1, 8)),
    "strength": (torch.tensor(1.0), torch.tensor(0.0)),
    "flag": (False, True),
}


def steps(kind: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(branch, arguments) of each call; masks are made anew for each."""
    for call in calls(TIMES):
        for branch, drop in enumerate(DROPS[kind]):
            yield branch, (*call, drop.clone() if isinstance(drop, Tensor) else drop)


@torch.no_grad()
@pytest.mark.parametrize("kind", DROPS)
def test_a_mask_or_a_flag_tells_branches_apart(kind: str):
    model = Dropping(kind).eval()
    ours = compiled(model)
    for _ in range(2):
        made = [ours(*arguments) for _, arguments in steps(kind)]
        assert chipmunk_fx.summary(ours).phases == {0: STEPS, 1: STEPS}
        assert not chipmunk_fx.summary(ours).fallbacks
        named = []
        for branch, arguments in steps(kind):
            with chipmunk_fx.generation(ours, key="named", branch=branch):
                named.append(ours(*arguments))
        assert identical(made, named)
        dense = [model(*arguments) for _, arguments in steps(kind)]
        for ours_, theirs in zip(made[:2], dense[:2], strict=True):
            torch.testing.assert_close(ours_, theirs)
        chipmunk_fx.reset(ours)


class Counted(TinyDiT):
    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, times: int = 1) -> Tensor:
        return super().forward(latents, timestep, text * times)


@torch.no_grad()
def test_a_number_that_becomes_an_input_of_the_graph_tells_branches_apart():
    ours = compiled(Counted())
    for _ in range(2):
        for call in calls(TIMES):
            for times in (2, 3):
                ours(*call, times)
        phases = chipmunk_fx.summary(ours).phases
        chipmunk_fx.reset(ours)
    assert phases == {0: STEPS, 1: STEPS}


@torch.no_grad()
@pytest.mark.parametrize("kind", DROPS)
def test_branches_whose_number_is_given_are_told_by_place(kind: str):
    ours = compiled(Dropping(kind).eval(), schedule__branches=2)
    for _, arguments in steps(kind):
        ours(*arguments)
    assert chipmunk_fx.summary(ours).phases == {0: STEPS, 1: STEPS}


@torch.no_grad()
def test_guidance_by_a_mask_may_pause():
    ours = compiled(Dropping("mask").eval())
    listed = list(steps("mask"))
    for _, arguments in [*listed[:4], listed[5], *listed[6:]]:  # the third step has the second branch alone
        ours(*arguments)
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "sparse"], 1: STEPS}


@torch.no_grad()
def test_calls_that_are_alike_in_all_are_steps():
    ours, (call,) = compiled(Dropping("mask").eval()), calls((900,))
    for _ in range(4):
        ours(*call, DROPS["mask"][0].clone())
    assert chipmunk_fx.summary(ours).phases == {0: STEPS}


@torch.no_grad()
def test_a_residual_of_a_control_network_tells_branches_apart():
    class Controlled(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, residual: Any = None) -> Tensor:
            return super().forward(latents, timestep, text if residual is None else text + residual)

    ours = compiled(Controlled())
    for call in calls(TIMES):
        ours(*call, torch.ones(1, 8, 16))
        ours(*call)
    assert chipmunk_fx.summary(ours).phases == {0: STEPS, 1: STEPS}


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_an_image_joined_to_the_latents_tells_branches_apart(last: bool):
    """InstructPix2Pix, and image-to-video whose unconditional call has no image."""

    class Joined(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
            return super().forward(
                latents.unflatten(1, (16, 16)).permute(0, 3, 1, 2) if last else latents, timestep, text
            )

    ours = compiled(Joined())
    for seed in range(2):
        for latents, timestep, text in calls(TIMES, seed=seed):
            for image in (noise(3), noise(4), torch.zeros_like(latents)):
                both = torch.cat([latents[:, :2], image[:, 2:]], 1)
                ours(both.flatten(2).mT.contiguous() if last else both, timestep, text)
        assert chipmunk_fx.summary(ours).phases == {branch: STEPS for branch in range(3)}
    assert not chipmunk_fx.summary(ours).fallbacks


@torch.no_grad()
def test_one_sample_of_a_batch_that_is_a_new_picture_begins_a_generation():
    ours = compiled(TinyDiT())
    ours(noise(1, batch=2), torch.tensor([850.0, 350.0]))
    ours(noise(1, batch=2), torch.tensor([800.0, 300.0]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse"]}
    ours(noise(1, batch=2), torch.tensor([250.0, 750.0]))  # whose mean goes down
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh"]}


@torch.no_grad()
def test_latents_of_another_picture_are_named_once(caplog: pytest.LogCaptureFixture):
    ours = compiled(TinyDiT())
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        run(ours, calls(TIMES[:2]))
        assert not caplog.records
        run(ours, calls(TIMES[2:], seed=7))
        run(ours, calls((200, 100), seed=8))
    (record,) = caplog.records
    assert "bear no resemblance" in record.message and "chipmunk_fx.reset" in record.message
