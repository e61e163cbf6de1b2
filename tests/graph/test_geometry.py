"""The grid of patches behind a sequence, and where its text stands."""

import pytest
import torch

from chipmunk_fx.errors import ConfigError
from chipmunk_fx.graph.geometry import Geometry, Layout, grid_of_ids
from chipmunk_fx.graph.sizes import bindings
from tests.graph.capturing import captured, captured_from_zoo, captured_tiny
from tests.graph.test_inputs import Rotary, ids
from tests.runtime.models import WIDTH, Block, TinyDiT, calls, noise, words

CALL = calls([900], side=12)[0]


class TextLast(TinyDiT):
    def forward(self, latents, timestep, text):
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.context(text)], dim=1)
        x = self.blocks[0](x + self.time((timestep[:, None] * torch.ones(WIDTH)).sin())[:, None])
        return self.out(x[:, : h * w // 4]).reshape(b, -1, h, w)


class Video(TinyDiT):
    """latents [B, t, C, h, w]: every frame is patchified by itself."""

    def forward(self, latents, timestep):
        x = self.embed(latents.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, latents.shape[:2]).flatten(1, 2)
        x = self.blocks[0](x + self.time((timestep[:, None] * torch.ones(WIDTH)).sin())[:, None])
        return self.out(x).reshape(latents.shape)


def grid(seen, **options):
    return seen.geometry(**options).grid(bindings(seen.capture.fakes, seen.inputs), seen.inputs)


def test_a_convolution_that_patchifies():
    seen = captured_tiny(side=12)
    geometry = seen.geometry()
    assert (grid(seen), geometry.side, geometry.source) == ((1, 6, 6), "first", "convolution conv2d")
    assert geometry.layout(44, (1, 6, 6)) == Layout((1, 6, 6), "first", 8)


def test_text_after_the_image():
    seen = captured(TextLast(), *CALL)
    assert seen.geometry().layout(44, grid(seen)) == Layout((1, 6, 6), "last", 8)


@pytest.mark.parametrize("model", [TinyDiT(), TextLast()])
def test_text_as_long_as_the_image_is_still_told_apart(model: TinyDiT):
    seen = captured(model, CALL[0], CALL[1], words(count=36))
    side = "last" if isinstance(model, TextLast) else "first"
    assert seen.geometry().layout(72, grid(seen)) == Layout((1, 6, 6), side, 36)


def test_frames_that_are_patchified_one_by_one():
    seen = captured(Video(), torch.randn(2, 3, 4, 8, 12), torch.ones(2))
    assert grid(seen) == (3, 4, 6)


def test_position_ids_are_read_at_the_call():
    seen = captured(Rotary(), torch.randn(1, 24, WIDTH), torch.ones(1), ids(1, 4, 6))
    assert grid(seen) == (1, 4, 6) and "img_ids" in seen.geometry().source
    turned = [ids(1, 6, 4) if seen.names[i] == "img_ids" else value for i, value in enumerate(seen.inputs)]
    assert seen.geometry().grid({}, turned) == (1, 6, 4)


def test_ids_that_are_no_raster_are_no_grid():
    assert grid_of_ids(ids(2, 3, 4)) == (2, 3, 4)
    assert grid_of_ids(ids(1, 3, 4).float()[None]) == (1, 3, 4)
    assert grid_of_ids(ids(1, 3, 4) + torch.tensor([0, 7, 5])) == (1, 3, 4)
    assert grid_of_ids(ids(1, 3, 4).flip(0)) is None
    assert grid_of_ids(ids(1, 3, 4)[:-1]) is None
    assert grid_of_ids(torch.zeros(12, 3)) is None
    assert grid_of_ids(torch.zeros(12)) is None
    assert grid_of_ids(None) is None


def test_a_dynamic_size_gives_the_grid_of_the_call():
    text = calls([900], [words(count=5)], side=12)[0][2]
    seen = captured(TinyDiT(), *CALL, dynamic=True)
    inputs = [text if value is CALL[2] else value for value in seen.inputs]
    assert seen.geometry().layout(41, grid(seen)) == Layout((1, 6, 6), "first", 5)
    assert 5 in bindings(seen.capture.fakes, [5 if isinstance(v, int) else v for v in inputs]).values()


def test_a_block_alone_has_raster_order():
    seen = captured(Block(), torch.randn(1, 24, WIDTH))
    assert grid(seen) is None and "raster" in seen.geometry().source


def test_the_users_grid_and_text_come_first():
    seen = captured_tiny(side=12)
    geometry = seen.geometry(tokens__grid=(1, 4, 9), tokens__text=("last", 8))
    assert geometry.source == "option tokens.grid"
    assert geometry.layout(44, grid(seen, tokens__grid=(1, 4, 9))) == Layout((1, 4, 9), "last", 8)


def test_the_users_grid_alone_finds_the_text():
    seen = captured_tiny(side=12)
    assert seen.geometry(tokens__grid=(1, 6, 6)).layout(44, (1, 6, 6)) == Layout((1, 6, 6), "first", 8)


def test_the_users_text_goes_with_the_grid_that_is_found():
    seen = captured_tiny(side=12)
    geometry = seen.geometry(tokens__text=("last", 8))
    assert geometry.layout(44, grid(seen)) == Layout((1, 6, 6), "last", 8)


@pytest.mark.parametrize(
    "options", [{"tokens__grid": (1, 5, 5)}, {"tokens__grid": (1, 6, 6), "tokens__text": ("first", 9)}]
)
def test_a_grid_that_explains_no_sequence_is_an_error(options):
    seen = captured(TinyDiT(), noise(side=12), torch.ones(1), words(count=8))
    with pytest.raises(ConfigError, match="44") as error:
        seen.geometry(**options)
    assert error.value.key == "tokens.grid"


def test_a_piece_may_hold_another_tower_than_the_grid_is_for():
    seen = captured(Block(), torch.randn(1, 24, WIDTH))
    assert grid(seen, tokens__grid=(1, 5, 5)) is None
    assert grid(seen, tokens__grid=(1, 4, 6)) == (1, 4, 6)


def test_a_layout_explains_its_length_or_is_none():
    geometry = Geometry((1, 4, 4), None, "first", None, "")
    assert geometry.layout(20, (1, 4, 4)) == Layout((1, 4, 4), "first", 4)
    assert geometry.layout(16, (1, 4, 4)) == Layout((1, 4, 4), None, 0)
    assert geometry.layout(12, (1, 4, 4)) is None
    assert geometry.layout(20, None) is None
    assert Geometry((1, 4, 4), None, None, None, "").layout(20, (1, 4, 4)) is None
    assert Geometry((1, 4, 4), None, "first", 3, "").layout(20, (1, 4, 4)) is None


@pytest.mark.parametrize(
    ("name", "rows", "layout"),
    [
        ("Flux", 64, Layout((1, 4, 4), "first", 48)),
        ("SD3", 1024 + 154, Layout((1, 32, 32), "last", 154)),
        ("Wan", 128, Layout((2, 8, 8), None, 0)),
        ("DiT", 16, Layout((1, 4, 4), None, 0)),
    ],
)
def test_diffusers_models(name: str, rows: int, layout: Layout):
    seen = captured_from_zoo(name)
    assert seen.geometry().layout(rows, grid(seen)) == layout
