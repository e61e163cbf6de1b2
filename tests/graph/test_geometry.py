"""The grid of patches behind a sequence, and where its text stands."""

import pytest
import torch

from chipmunk_fx.errors import ConfigError
from chipmunk_fx.graph.geometry import Geometry, Layout, grids_of_ids
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


def grids(seen, **options):
    return seen.geometry(**options).grids(bindings(seen.capture.fakes, seen.inputs), seen.inputs)


def test_a_convolution_that_patchifies():
    seen = captured_tiny(side=12)
    geometry = seen.geometry()
    assert (grids(seen), geometry.side, geometry.source) == (((1, 6, 6),), "first", "convolution conv2d")
    assert geometry.layout(44, ((1, 6, 6),)) == Layout(((1, 6, 6),), "first", 8)


def test_text_after_the_image():
    seen = captured(TextLast(), *CALL)
    assert seen.geometry().layout(44, grids(seen)) == Layout(((1, 6, 6),), "last", 8)


@pytest.mark.parametrize("model", [TinyDiT(), TextLast()])
def test_text_as_long_as_the_image_is_still_told_apart(model: TinyDiT):
    seen = captured(model, CALL[0], CALL[1], words(count=36))
    side = "last" if isinstance(model, TextLast) else "first"
    assert seen.geometry().layout(72, grids(seen)) == Layout(((1, 6, 6),), side, 36)


def test_frames_that_are_patchified_one_by_one():
    seen = captured(Video(), torch.randn(2, 3, 4, 8, 12), torch.ones(2))
    assert grids(seen) == ((3, 4, 6),)


def test_position_ids_are_read_at_the_call():
    seen = captured(Rotary(), torch.randn(1, 24, WIDTH), torch.ones(1), ids(1, 4, 6))
    assert grids(seen) == ((1, 4, 6),) and "img_ids" in seen.geometry().source
    turned = [ids(1, 6, 4) if seen.names[i] == "img_ids" else value for i, value in enumerate(seen.inputs)]
    assert seen.geometry().grids({}, turned) == ((1, 6, 4),)


def test_ids_that_are_no_raster_are_no_grid():
    assert grids_of_ids(ids(4, 3, 4)) == ((4, 3, 4),)
    assert grids_of_ids(ids(1, 3, 4).float()[None]) == ((1, 3, 4),)
    assert grids_of_ids(ids(1, 3, 4)[:, 1:]) == ((1, 3, 4),)
    assert grids_of_ids(ids(1, 3, 4) + torch.tensor([0, 7, 5])) == ((1, 3, 4),)
    assert grids_of_ids(ids(1, 3, 4).flip(0)) == ()
    assert grids_of_ids(ids(1, 3, 4)[:-1]) == ()
    assert grids_of_ids(torch.zeros(12, 3)) == ()
    assert grids_of_ids(torch.zeros(12)) == ()
    assert grids_of_ids(None) == ()


def picture(t: float, h: int, w: int, wide: int = 3) -> torch.Tensor:
    """Ids of one picture: (t, row, column), in FLUX.2 with a fourth one for text."""
    return torch.nn.functional.pad(ids(1, h, w).float() + torch.tensor([t, 0, 0]), (0, wide - 3))


@pytest.mark.parametrize(
    ("sequence", "want"),
    [
        ([picture(0, 4, 6), picture(1, 4, 6)], ((1, 4, 6), (1, 4, 6))),  # as FLUX Kontext's, of one size
        ([picture(0, 4, 6), picture(1, 8, 3)], ((1, 4, 6), (1, 8, 3))),
        ([picture(0, 4, 6, 4), *(picture(10 * i, 2, 5, 4) for i in (1, 2, 3))], ((1, 4, 6), *((1, 2, 5),) * 3)),
        ([picture(10 * i, 4, 6, 4) for i in range(4)], ((1, 4, 6),) * 4),  # as FLUX.2's
        ([picture(0, 4, 6), picture(0, 2, 3)], ((1, 4, 6), (1, 2, 3))),  # the ids start anew
        ([picture(0, 4, 6)[:, 1:], picture(0, 2, 3)[:, 1:]], ((1, 4, 6), (1, 2, 3))),
        ([picture(0, 4, 6), picture(0, 4, 6) + torch.tensor([0, 0, 6])], ((1, 4, 6), (1, 4, 6))),  # further right
        ([picture(0, 4, 6), picture(1, 4, 6)[:-1]], ()),
    ],
)
def test_several_pictures_in_one_sequence(sequence: list[torch.Tensor], want: tuple):
    assert grids_of_ids(torch.cat(sequence)) == want
    geometry = Geometry(None, 0, "first", None, "")
    image = sum(h * w for _, h, w in want)
    assert geometry.layout(image + 5, want) == (Layout(want, "first", 5) if want else None)


def test_text_among_the_ids_has_a_place_for_each_token():
    counted = torch.arange(5.0)[:, None].expand(5, 3)
    for text in (torch.zeros(5, 3), counted):
        assert grids_of_ids(torch.cat([text, picture(0, 4, 6)])) == ((1, 4, 6),)
    assert grids_of_ids(torch.cat([picture(0, 4, 6), torch.zeros(5, 3)])) == ((1, 4, 6),)
    assert grids_of_ids(torch.cat([picture(0, 4, 6), torch.zeros(5, 3), picture(0, 4, 6)])) == ()


def test_a_dynamic_size_gives_the_grid_of_the_call():
    text = calls([900], [words(count=5)], side=12)[0][2]
    seen = captured(TinyDiT(), *CALL, dynamic=True)
    inputs = [text if value is CALL[2] else value for value in seen.inputs]
    assert seen.geometry().layout(41, grids(seen)) == Layout(((1, 6, 6),), "first", 5)
    assert 5 in bindings(seen.capture.fakes, [5 if isinstance(v, int) else v for v in inputs]).values()


def test_a_block_alone_has_raster_order():
    seen = captured(Block(), torch.randn(1, 24, WIDTH))
    assert grids(seen) == () and "raster" in seen.geometry().source


def test_the_users_grid_and_text_come_first():
    seen = captured_tiny(side=12)
    geometry = seen.geometry(tokens__grid=(1, 4, 9), tokens__text=("last", 8))
    assert geometry.source == "option tokens.grid"
    assert geometry.layout(44, grids(seen, tokens__grid=(1, 4, 9))) == Layout(((1, 4, 9),), "last", 8)


def test_the_users_grid_alone_finds_the_text():
    seen = captured_tiny(side=12)
    assert seen.geometry(tokens__grid=(1, 6, 6)).layout(44, ((1, 6, 6),)) == Layout(((1, 6, 6),), "first", 8)


def test_the_users_text_goes_with_the_grid_that_is_found():
    seen = captured_tiny(side=12)
    geometry = seen.geometry(tokens__text=("last", 8))
    assert geometry.layout(44, grids(seen)) == Layout(((1, 6, 6),), "last", 8)


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
    assert grids(seen, tokens__grid=(1, 5, 5)) == ()
    assert grids(seen, tokens__grid=(1, 4, 6)) == ((1, 4, 6),)


def test_a_layout_explains_its_length_or_is_none():
    geometry = Geometry((1, 4, 4), None, "first", None, "")
    assert geometry.layout(20, ((1, 4, 4),)) == Layout(((1, 4, 4),), "first", 4)
    assert geometry.layout(16, ((1, 4, 4),)) == Layout(((1, 4, 4),), None, 0)
    assert geometry.layout(12, ((1, 4, 4),)) is None
    assert geometry.layout(20, ()) is None
    assert Geometry((1, 4, 4), None, None, None, "").layout(20, ((1, 4, 4),)) is None
    assert Geometry((1, 4, 4), None, "first", 3, "").layout(20, ((1, 4, 4),)) is None


@pytest.mark.parametrize(
    ("name", "rows", "layout"),
    [
        ("Flux", 64, Layout(((1, 4, 4),), "first", 48)),
        ("SD3", 1024 + 154, Layout(((1, 32, 32),), "last", 154)),
        ("Wan", 128, Layout(((2, 8, 8),), None, 0)),
        ("DiT", 16, Layout(((1, 4, 4),), None, 0)),
        ("QwenImage", 24, Layout(((1, 4, 4),), "first", 8)),
        pytest.param("LTX", 512, Layout(((2, 16, 16),), None, 0), marks=pytest.mark.full),
    ],
)
def test_diffusers_models(name: str, rows: int, layout: Layout):
    seen = captured_from_zoo(name)
    assert seen.geometry().layout(rows, grids(seen)) == layout
