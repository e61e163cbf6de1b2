"""Where in the picture tokens come from, whatever way it was cut to patches."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from chipmunk_fx.graph import places as module
from chipmunk_fx.graph.geometry import _raster
from chipmunk_fx.graph.places import Told, _carried, entering, leaving, positions
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import behind
from tests.graph.capturing import captured, traced
from tests.runtime.models import WIDTH, TinyDiT

PATCH = torch.randn(WIDTH, 16)  # of 2x2 patches of 4 channels
PIXEL, CHANNEL = torch.randn(16, WIDTH), torch.randn(WIDTH, 4)
LATENTS = torch.randn(2, 4, 8, 12)
VIDEO = torch.randn(1, 4, 6, 8, 12)


def reshaped(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return F.linear(x.reshape(b, h * w // 4, 4 * c), PATCH)


def summed(x: Tensor) -> Tensor:
    """As einops and einsum write it."""
    b, c, h, w = x.shape
    x = torch.einsum("nchpwq->nhwpqc", x.reshape(b, c, h // 2, 2, w // 2, 2))
    return F.linear(x.reshape(b, -1, 4 * c), PATCH)


def projected_first(x: Tensor) -> Tensor:
    """[B, h, w, C] is projected, and flattened to a sequence only after a norm."""
    x = F.linear(F.pixel_unshuffle(x, 2).movedim(1, -1), PATCH)
    return F.layer_norm(x, (WIDTH,)).flatten(1, 2)


def unfolded(x: Tensor) -> Tensor:
    return F.linear(F.unfold(x, 2, stride=2).transpose(1, 2), PATCH)


def padded(x: Tensor) -> Tensor:
    """From 7 x 11 to 8 x 12, then eight more tokens than patches."""
    x = reshaped(F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1)))
    return F.layer_norm(torch.cat([x, torch.zeros(2, 8, WIDTH)], 1), (WIDTH,))


def tokens_first(x: Tensor) -> Tensor:
    return reshaped(x).transpose(0, 1)


def cut_video(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
    return F.linear(x, PATCH).flatten(1, 3)


def told_of(function: Callable[[Tensor], Tensor], x: Tensor, longest: int = 500) -> Told | None:
    graph = traced(function, x).graph
    latents = next(n for n in graph.nodes if n.op == "placeholder")
    return entering(graph, latents, lambda image: 1 < image <= longest, _raster)


@pytest.mark.parametrize("cut", [reshaped, summed, projected_first, unfolded, padded, tokens_first])
def test_pictures_are_cut_in_many_ways(cut: Callable[[Tensor], Tensor]):
    told = told_of(cut, LATENTS)
    assert told and told.sizes == (1, 4, 6) and told.side is None


def test_a_video():
    told = told_of(cut_video, VIDEO)
    assert told and told.sizes == (6, 4, 6)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: F.linear(x.flatten(2).transpose(1, 2)[:, torch.arange(95, -1, -1)], CHANNEL),  # no order that is told
        lambda x: F.linear(x.flatten(1, 2).transpose(1, 2), torch.randn(WIDTH, 32)),  # columns of the picture
        lambda x: F.linear(x.permute(0, 3, 2, 1).flatten(1, 2), CHANNEL),  # by columns
        lambda x: x.flatten(2).transpose(1, 2),  # no projection
    ],
)
def test_what_is_no_raster_of_patches_is_not_told(other: Callable[[Tensor], Tensor]):
    assert told_of(other, LATENTS) is None


def test_products_are_not_computed_and_large_layouts_not_copied(monkeypatch: pytest.MonkeyPatch):
    def attention(x: Tensor) -> Tensor:
        x = reshaped(x)
        return torch.einsum("bnc,bmc->bnm", x, x)

    graph = traced(attention, LATENTS).graph
    start = next(n for n in graph.nodes if n.op == "placeholder")
    places = torch.arange(LATENTS.numel(), dtype=torch.float64).view(LATENTS.shape)
    names = [node.name for node, _ in _carried(graph, {start: places})]
    assert names and not any("einsum" in name or "bmm" in name for name in names)
    monkeypatch.setattr(module, "_MOST", 100)
    assert len(list(_carried(graph, {start: places}))) < len(names)
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    assert len(list(_carried(graph, {start: places}))) <= 1


def test_a_sequence_longer_than_any_attention_is_none():
    assert told_of(reshaped, LATENTS, longest=20) is None


@pytest.mark.parametrize(("before", "after", "side"), [(5, 0, "first"), (0, 3, "last"), (0, 0, None), (5, 3, None)])
def test_tokens_are_put_together_to_a_picture(before: int, after: int, side: str | None):
    def picture(x: Tensor) -> Tensor:
        pixels = F.linear(x, PIXEL)[:, before : before + 24]
        return torch.einsum("nhwpqc->nchpwq", pixels.reshape(2, 4, 6, 2, 2, 4)).reshape(2, 4, 8, 12)

    graph = traced(picture, torch.randn(2, before + 24 + after, WIDTH)).graph
    told = leaving(graph, lambda image: image == 24, _raster)
    assert told and (told.sizes, told.side) == ((1, 4, 6), side)
    assert leaving(traced(lambda x: F.linear(x, PIXEL), torch.randn(2, 24, WIDTH)).graph, bool, _raster) is None


def test_positions_that_are_laid_out_in_the_graph():
    def turned(x: Tensor) -> Tensor:
        t, h, w = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), torch.arange(6.0), indexing="ij")
        return x * torch.stack([t, h, w], -1).flatten(0, 2).cos().sum(-1, keepdim=True)

    def told(graph: fx.Graph, length: int) -> Told | None:
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        return positions(graph, behind(graph, inputs), lambda image: image == length)

    graph = traced(turned, torch.randn(1, 72, WIDTH)).graph
    found = told(graph, 72)
    assert found and found.sizes == (3, 4, 6)
    assert told(graph, 24) is None
    assert (
        told(traced(lambda x: x.reshape(1, 3, 4, 6, WIDTH).flatten(1, 3), torch.randn(1, 72, WIDTH)).graph, 72) is None
    )


class Reshaped(TinyDiT):
    """Patches by reshape, permute and a linear; sizes that are not whole patches are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.pixels = torch.nn.Linear(16, WIDTH), torch.nn.Linear(WIDTH, 16)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        b, c, h, w = latents.shape
        x = F.pad(latents, (0, w % 2, 0, h % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = self.patches(x) + self.time((timestep[:, None] * torch.ones(WIDTH)).sin())[:, None]
        return self.pixels(self.blocks[0](x))


@pytest.mark.parametrize("size", [(8, 12), (7, 11)])
def test_sizes_that_move_stay_symbols(size: tuple[int, int]):
    seen = captured(Reshaped(), torch.randn(2, 4, *size), torch.ones(2), dynamic=True)
    sizes = seen.geometry().sizes
    assert sizes is not None and hints(sizes) == (1, 4, 6)
    assert any(isinstance(n, torch.SymInt) for n in sizes)
    assert "patches of latents" in seen.geometry().source
