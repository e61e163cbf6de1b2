"""What a graph's inputs mean, on hand-written models and on some of diffusers'."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.capturing import captured, captured_from_zoo, captured_tiny
from tests.harness.zoo import facts
from tests.runtime.models import WIDTH, Block, TinyDiT, Unsure, calls, noise, words


class Guided(TinyDiT):
    """A second sinusoid: guidance strength, or a size."""

    def forward(self, latents, timestep, guidance, text):
        return super().forward(latents, timestep, text) + super().forward(latents, guidance, text)


class Listed(TinyDiT):
    """Latents, and texts, come as lists with one tensor a sample."""

    def forward(self, x, timestep, texts):
        return list(super().forward(torch.stack(x), timestep, torch.stack(texts)))


class OneByOne(Listed):
    def forward(self, x, timestep, texts):
        return [TinyDiT.forward(self, y[None], timestep[:1], texts[0][None])[0] for y in x]


class Passing(TinyDiT):
    """Names nothing: its latents and its text stand in one tuple."""

    def forward(self, inputs, timestep):
        return super().forward(inputs[0], timestep, inputs[1])


class Unnamed(TinyDiT):
    def forward(self, a, b, c):
        return super().forward(a, b, c)


class Classes(TinyDiT):
    """Class labels in place of text."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(10, WIDTH)

    def forward(self, latents, timestep, labels):
        return super().forward(latents + self.labels(labels)[:, :4, None, None], timestep)


class Pictured(Classes):
    """Labels and a pooled text beside a picture, of which a mask leaves parts out."""

    def forward(self, latents, timestep, labels, pooled, picture, mask, guidance):
        picture = F.conv2d(picture * mask, self.embed.weight[:4]) * guidance[0]
        return super().forward(latents + picture + self.context(pooled)[:, :4, None, None], timestep, labels)


class Controlled(TinyDiT):
    """Residuals of another network, added to the tokens."""

    def forward(self, latents, timestep, text, samples):
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time((timestep[:, None] * torch.arange(1, WIDTH + 1)).sin())[:, None]
        for block, sample in zip(self.blocks, samples, strict=True):
            x = block(torch.cat([self.context(text), x], 1))[:, text.shape[1] :] + 0.5 * sample
        return self.out(x).mT.unflatten(2, (8, 8))


class Waved(TinyDiT):
    """A sine of projected tokens is an activation."""

    def forward(self, latents, timestep, text):
        return super().forward(
            latents, timestep, F.linear(F.linear(text, text[0, :8].mT @ text[0, :8]).sin(), text[0, :16])
        )


class Framed(TinyDiT):
    """A timestep for every frame."""

    def forward(self, latents, timestep, text):
        return super().forward(latents, timestep.flatten(1).amax(1), text)


class Rotary(nn.Module):
    """Tokens with positions given as ids [N, 3], used for rotary embedding only."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.time = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, timestep, img_ids):
        angles = (img_ids[:, :, None].float() * torch.arange(1, 6)).flatten(1)
        hidden_states = hidden_states * angles.cos().mean(-1)[:, None] + angles.sin().mean(-1)[:, None]
        waves = (timestep[:, None] * torch.arange(1, WIDTH + 1)).sin()
        return self.block(hidden_states + self.time(waves)[:, None])


class Table(TinyDiT):
    """Times in a table, one for each of 1000 steps; labels are in another."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.labels = nn.Embedding(1000, WIDTH), nn.Embedding(10, WIDTH)

    def forward(self, latents, timestep, labels):
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.times(timestep.long())[:, None] + self.labels(labels)[:, None]
        return self.out(self.blocks[0](x))


class Normed(TinyDiT):
    """Waves of a noise level are normed before they are projected (AlphaFold 3)."""

    def forward(self, latents, t_hat_noise_level, text=None):
        x = self.embed(latents).flatten(2).transpose(1, 2)
        waves = (t_hat_noise_level.log()[:, None] * torch.arange(1, WIDTH + 1) + 0.5).cos()
        return self.out(self.blocks[0](x + self.time(F.layer_norm(waves, (WIDTH,)))[:, None]))


class Token(TinyDiT):
    """The time is a token among the others (U-ViT)."""

    def forward(self, latents, when, text=None):
        waves = (when.reshape(-1, 1) * torch.arange(1, WIDTH + 1)).sin()
        x = torch.cat([waves[:, None], self.embed(latents).flatten(2).transpose(1, 2)], 1) + self.time.bias
        return self.out(self.blocks[0](x)[:, 1:])


class Raw(TinyDiT):
    """Time and a strength go to linears as they are, without a sinusoid."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.strength = nn.Linear(1, WIDTH), nn.Linear(1, WIDTH)

    def forward(self, latents, t, strength):
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time(t.view(-1, 1))[:, None] + self.strength(strength[:, None])[:, None]
        return self.out(self.blocks[0](x))


class Modulated(Block):
    """A block that calls the modulation it is given by the name of a time."""

    def forward(self, x, timestep):
        return super().forward(x * timestep[:, None])


def ids(t: int, h: int, w: int) -> torch.Tensor:
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3)


def test_timestep_latents_and_text():
    seen = captured_tiny()
    assert (seen.role("timestep"), seen.role("latents"), seen.role("text")) == ("timestep", "latents", ("text",))
    assert seen.roles.ids == ()


def test_names_are_not_needed():
    seen = captured(Unnamed(), *calls([900])[0])
    assert (seen.role("timestep"), seen.role("latents"), seen.role("text")) == ("b", "a", ("c",))


def test_a_time_may_be_looked_up():
    seen = captured(Table(), noise(), torch.tensor([900]), torch.tensor([3]))
    assert seen.role("timestep") == "timestep"


@pytest.mark.parametrize(
    "time", [torch.tensor([0.9]), torch.tensor(0.9), torch.tensor([[0.9]])], ids=lambda t: str(t.ndim)
)
def test_a_time_without_a_sinusoid_is_told_by_its_name(time: torch.Tensor):
    seen = captured(Raw(), noise(), time, torch.ones(1))
    assert (seen.role("timestep"), seen.role("latents")) == ("t", "latents")


def test_a_vector_of_the_name_of_a_time_is_none():
    assert captured(Modulated(), torch.randn(1, 24, WIDTH), torch.ones(1, WIDTH)).roles.timestep is None


def test_a_timestep_may_have_a_value_for_every_frame():
    latents, _, text = calls([900])[0]
    assert captured(Framed(), latents, torch.full((1, 1, 3), 900.0), text).role("timestep") == "timestep"


def test_a_better_name_wins_between_two_sinusoids():
    latents, timestep, text = calls([900])[0]
    for order in ((timestep, timestep * 0 + 3), (timestep * 0 + 3, timestep)):
        assert captured(Guided(), latents, *order, text).role("timestep") == "timestep"


def test_class_labels_stand_for_text_where_there_is_none():
    latents, timestep, _ = calls([900])[0]
    seen = captured(Classes(), latents, timestep, torch.tensor([3]))
    assert seen.role("text") == ("labels",)


def test_labels_and_pooled_texts_count_beside_a_picture_and_masks_and_strengths_do_not():
    latents, timestep, _ = calls([900])[0]
    rest = torch.randn(1, 16), noise(side=17), torch.rand(17, 17) > 0.5, torch.ones(1)
    seen = captured(Pictured(), latents, timestep, torch.tensor([3]), *rest)
    assert seen.role("text")[0] == "picture" and set(seen.role("text")) == {"picture", "labels", "pooled"}


class Beside(TinyDiT):
    """A picture, and what one of `WAYS` makes of something else: a bias of channels, or tokens."""

    def __init__(self, way) -> None:
        super().__init__()
        self.way, self.norm, self.table = way, nn.LayerNorm(16), nn.Embedding(1000, 16)

    def forward(self, latents, timestep, other, picture):
        latents = latents + F.conv2d(picture, self.embed.weight[:4, :, :1, :1])
        made = self.way(self, other)
        if made.dim() == 3:
            return super().forward(latents, timestep, made)
        return super().forward(latents + self.context(made)[:, :4, None, None], timestep)


def padded(text: torch.Tensor) -> torch.Tensor:
    return torch.cat([text, text.new_zeros(12 - len(text), 16)])


POOLED, LABEL, TEXT = torch.randn(1, 16), torch.tensor([3]), words()[0]
WAYS = {
    "a list of texts, padded by cat": ([TEXT], lambda m, x: torch.stack([padded(u) for u in x])),
    "a list of texts, padded": ([TEXT], lambda m, x: torch.stack([F.pad(u, (0, 0, 0, 12 - len(u))) for u in x])),
    "a norm": (POOLED, lambda m, x: m.norm(x)),
    "a norm written out": (POOLED, lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    "silu": (POOLED, lambda m, x: F.silu(x)),
    "gelu, scaled": (POOLED, lambda m, x: F.gelu(x, approximate="tanh") * 2 + 1),
    "a label shifted": (LABEL, lambda m, x: m.table(x + 1)),
    "a label where there is one": (LABEL, lambda m, x: m.table(torch.where(x < 0, 999, x))),
    "a label wrapped": (LABEL, lambda m, x: m.table(x % 10)),
}


@pytest.mark.parametrize("name", WAYS)
def test_texts_and_labels_beside_a_picture_count_however_they_are_prepared(name: str):
    other, way = WAYS[name]
    seen = captured(Beside(way), noise(), torch.ones(1), other, noise(5))
    assert seen.role("text")[0] == "picture" and len(seen.role("text")) == 2
    assert seen.role("latents") == "latents"


MASKS = {
    "of a text": (torch.ones(1, 8), lambda m, x: torch.ones(1, 8, 16) * x[..., None]),
    "that tells kinds of tokens apart": (torch.ones(1, 8).long(), lambda m, x: m.table((x == 3).long())),
    "a strength": (torch.ones(1, 1), lambda m, x: torch.ones(1, 8, 16) * x),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_strengths_beside_a_picture_do_not_count(name: str):
    other, way = MASKS[name]
    assert captured(Beside(way), noise(), torch.ones(1), other, noise(5)).role("text") == ("picture",)


def test_residuals_of_a_control_network_are_no_text():
    samples = [torch.randn(1, 64, WIDTH) for _ in range(2)]
    seen = captured(Controlled(2), *calls([900])[0], samples)
    assert seen.role("text") == ("text",)


@pytest.mark.parametrize("model", [Listed(), OneByOne()])
def test_a_list_of_latents_is_no_text(model: nn.Module):
    seen = captured(model, [*noise(batch=2)], torch.ones(2), [words(1)[0], words(2)[0]])
    assert (seen.role("latents"), seen.role("beside")) == ("x.0", ("x.1",))
    assert seen.role("text") == (("texts.0", "texts.1") if type(model) is Listed else ("texts.0",))


def test_a_text_in_one_tuple_with_the_latents_is_one():
    seen = captured(Passing(), (noise(), words()), torch.ones(1))
    assert (seen.role("latents"), seen.role("beside"), seen.role("text")) == ("inputs.0", (), ("inputs.1",))


def test_no_text():
    seen = captured(TinyDiT(), *calls([900])[0][:2])
    assert seen.role("timestep") == "timestep" and seen.roles.text == ()


def test_a_wave_of_projected_tokens_is_no_timestep():
    seen = captured(Waved(), noise(), torch.ones(1), words(count=16))
    assert (seen.role("timestep"), seen.role("text")) == ("timestep", ("text",))


def test_settings_that_dynamo_turns_into_scalars_are_no_text():
    seen = captured(TinyDiT(), *calls([900])[0][:2], dynamic=True)
    assert any(name.endswith("eps") for name in seen.names)
    assert seen.roles.text == ()


def test_position_ids():
    seen = captured(Rotary(), torch.randn(1, 24, WIDTH), torch.ones(1), ids(1, 4, 6))
    assert seen.role("ids") == ("img_ids",)
    assert (seen.role("timestep"), seen.role("latents")) == ("timestep", "hidden_states")


def test_a_block_alone_has_no_timestep():
    seen = captured(Block(), torch.randn(1, 24, WIDTH))
    assert seen.roles.timestep is None and seen.role("latents") == "x"


class Piece(nn.Module):
    """Returns tokens, as the first part of a model whose graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.time, self.project = Block(), nn.Linear(WIDTH, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, latents, timestep):
        waves = (timestep[:, None] * torch.arange(1, WIDTH + 1)).sin()
        return self.block(self.project(latents.flatten(2).mT) + self.time(waves)[:, None])


class Anonymous(Piece):
    def forward(self, a, b):
        return super().forward(a, b)


def test_a_piece_that_returns_tokens_finds_its_latents_by_name():
    seen = captured(Piece(), noise(), torch.ones(1))
    assert (seen.role("latents"), seen.role("text")) == ("latents", ())


def test_what_may_be_the_latents_is_not_taken_for_text():
    seen = captured(Anonymous(), noise(), torch.ones(1))
    assert (seen.role("timestep"), seen.roles.latents, seen.roles.text) == ("b", None, ())


class TextFirst(nn.Module):
    """Reads a text as long as the image before the image."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.project, self.context = Block(), nn.Linear(4, WIDTH), nn.Linear(16, WIDTH)
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, encoder_hidden_states, hidden_states):
        words = self.context(encoder_hidden_states)
        x = torch.cat([words, self.project(hidden_states)], 1)
        return self.out(self.block(x)[:, words.shape[1] :])


class TextOut(TextFirst):
    """A piece that returns its text first."""

    def forward(self, encoder_hidden_states, hidden_states):
        words = self.context(encoder_hidden_states)
        return words, self.project(hidden_states)


@pytest.mark.parametrize("piece", [TextFirst(), TextOut()])
def test_an_exact_name_comes_first(piece: nn.Module):
    seen = captured(piece, torch.randn(1, 24, 16), torch.randn(1, 24 if type(piece) is TextFirst else 30, 4))
    assert (seen.role("latents"), seen.role("text")) == ("hidden_states", ("encoder_hidden_states",))


@pytest.mark.parametrize("name", ["Flux", "SD3", "Wan", "DiT"])
def test_diffusers_models(name: str):
    seen, known = captured_from_zoo(name), facts(name)
    assert (seen.role("timestep"), seen.role("latents")) == (known["timestep"], known["latents"])
    text = ("class_labels",) if name == "DiT" else ("encoder_hidden_states",)
    assert seen.role("text")[:1] == text
    assert ("img_ids" in seen.role("ids")) == (name == "Flux")


def test_a_time_that_no_name_tells_is_doubtful():
    values = (noise(), torch.tensor([3.0]), torch.tensor([0.9]), words())
    seen = captured(Unsure(), *values)
    assert seen.role("timestep") == "a" and len(seen.roles.doubtful) == 1
    assert not {*seen.roles.doubtful} & {*seen.roles.rest, *seen.roles.text, seen.roles.timestep}
    assert captured(Guided(), *values).roles.doubtful == ()


def test_a_time_that_is_named_as_a_noise_level_is_not():
    class Denoiser(TinyDiT):
        """Of EDM."""

        def forward(self, latents, strength, c_noise, text):
            return super().forward(latents, c_noise, text) + super().forward(latents, strength, text)

    seen = captured(Denoiser(), noise(), torch.tensor([3.0]), torch.tensor([0.9]), words())
    assert seen.role("timestep") == "c_noise" and seen.roles.doubtful == ()
