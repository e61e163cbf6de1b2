"""Streams through the blocks of models that hold more than one, and what blocks write to in place."""

import pytest
import torch
from torch import Tensor, nn

import chipmunk_fx
from tests.runtime.models import CHANNELS, WIDTH, Block, TinyDiT, calls, exactly, run


class SoundAndPicture(TinyDiT):
    """Text is a stream of its own, as sound beside a picture is: each of the two blocks reads both."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.heard = nn.ModuleList(nn.ModuleList([Block(), nn.Linear(WIDTH, WIDTH)]) for _ in range(2)).eval()

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2) + timestep[:, None, None] / 1000
        y = self.context(text)
        for block, (beside, mix) in zip(self.blocks, self.heard, strict=True):  # pyright: ignore
            x, y = block(x), beside(y)
            x, y = x + mix(y.mean(1, keepdim=True)), y + mix(x.mean(1, keepdim=True))
        x = self.out(x) + y.mean((1, 2), keepdim=True)
        x = x.unflatten(1, (8, 8)).unflatten(-1, (2, 2, CHANNELS))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


class Routing(Block):
    """Fills zeros in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        sums = torch.zeros(x.shape[1], device=x.device)
        sums.scatter_add_(0, x[0, :, 0].argsort(), x[0, :, 1])
        return x + sums[:, None] * x


class Adapter(Block):
    """With no residual of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x


class Adapted(TinyDiT):
    """What an adapter, numbered as blocks are, makes after the last block is added behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.adapters = (nn.ModuleList(kind() for _ in range(2)).eval() for kind in (Block, Adapter))

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2) + timestep[:, None, None] / 1000
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = layer(x)
            x = x + 0.5 * adapter(x)
        x = self.out(x).unflatten(1, (8, 8)).unflatten(-1, (2, 2, CHANNELS))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def routing() -> TinyDiT:
    model = TinyDiT()
    torch.manual_seed(0)
    model.blocks = nn.ModuleList(Routing() for _ in range(2)).eval()
    return model


@pytest.mark.parametrize(("make", "streams"), [(SoundAndPicture, 2), (routing, 1), (Adapted, 1)])
def test_steps_that_stand_still_are_skipped_exactly(make, streams: int):
    still = [calls([900])[0]] * 3
    report = chipmunk_fx.explain(make(), *still[0])
    assert f"{report}".splitlines()[-1].count(" to ") == streams, str(report)
    ours = exactly(make(), schedule__skip_steps=[1, 2], schedule__steps=3, schedule__branches=1)
    for got, want in zip(run(ours, still), run(make(), still), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "skip", "skip"]}


class Beside(TinyDiT):
    """What its blocks, side by side, make is added behind them to what they read."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Adapter() for _ in range(depth)).eval()

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        for made in [block(x) for block in self.blocks]:
            x = x + made
        x = self.out(x).unflatten(1, (8, 8)).unflatten(-1, (2, 2, CHANNELS))
        x = x + 0 * timestep[:, None, None, None, None].sin()
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_added_behind_the_blocks_follows_what_they_read_once(depth: int):
    """All but the blocks is linear: a skipped step moves as it does, without them."""
    steps = calls([900, 900])
    steps = [(latents, time - i, text) for i, (latents, time, text) in enumerate(steps)]
    model, bare = Beside(depth), Beside(0)
    bare.load_state_dict(model.state_dict(), strict=False)
    ours = exactly(model, schedule__skip_steps=[1], schedule__steps=2, schedule__branches=1)
    first, second = run(ours, steps)
    before, after = run(bare, steps)
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "skip"]}
    torch.testing.assert_close(second - first, after - before, atol=1e-5, rtol=1e-4)
