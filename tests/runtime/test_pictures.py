"""A picture to work on and others to look at in one sequence, as FLUX Kontext has them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import EXACT, SPARSE, chipmunk, run

diffusers = pytest.importorskip("diffusers")
PICTURES = ((8, 8), (4, 12))  # rows and columns of tokens
WORDS = 5


def flux() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip


def ids(index: int, rows: int, columns: int) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.full((rows * columns, 1), index), grid], 1).float()


class Sampling(torch.nn.Module):
    """Positional arguments, as `run` gives them: latents [1, N, 4] and timestep [1]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        random = torch.Generator().manual_seed(1)
        self.words, self.pooled = torch.randn(1, WORDS, 32, generator=random), torch.randn(1, 32, generator=random)
        self.ids = torch.cat([ids(i, *size) for i, size in enumerate(PICTURES)])

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return self.model(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=self.words, pooled_projections=self.pooled,
            img_ids=self.ids, txt_ids=torch.zeros(WORDS, 3), return_dict=False,
        )[0]  # fmt: skip


def steps() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(2)
    latents, move = torch.randn(2, 1, 8 * 8 + 4 * 12, 4, generator=random)
    return [(latents + 0.1 * i * move, torch.full((1,), 1 - i / 4)) for i in range(4)]


def test_flux_orders_each_picture_by_itself():
    model, inputs = flux(), steps()
    torch._dynamo.reset()
    sparse = chipmunk(model, options=SPARSE | {"attention.density": 0.1})
    run(Sampling(sparse), inputs)
    assert chipmunk_fx.summary(sparse).phases == {0: ["refresh", "sparse", "sparse", "sparse"]}
    (session,) = registry.sessions(sparse)
    track = session.tracks[None]
    assert track.grids == ((1, 8, 8), (1, 4, 12))
    order = next(tables.order for (kind, *_), tables in track.tables.items() if kind == "attention")
    first, second = order[:64].long() - WORDS, order[64:112].long() - WORDS - 64
    # groups of 16 are patches of 4x4 in either picture
    for rows, columns in ((first.split(16), 8), (second.split(16), 12)):
        assert all(len((r // columns).unique()) == len((r % columns).unique()) == 4 for r in rows)
    assert order[112:].tolist() == list(range(WORDS))


def test_with_every_column_flux_is_dense():
    model, inputs = flux(), steps()
    torch._dynamo.reset()
    got, want = run(Sampling(chipmunk(model, options=EXACT)), inputs), run(Sampling(model), inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
