"""Queries and keys of a whole model are normed and rotated by one operator where it pays, and results stay the model's."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.config import Config
from chipmunk_fx.ops import library
from chipmunk_fx.runtime.variants import RECORDED_ROTARY_BYTES, ROTARY_BYTES, Variants
from tests.runtime.models import HEADS, SPARSE, WIDTH, Block, TinyDiT, calls

OPTIONS = {"lowering": "eager", "gate": "off", "attention.dense_layers": 0, "mlp.dense_layers": 0}


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=32, pooled_projection_dim=16, **sizes
    ).eval()  # fmt: skip


def steps(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    fixed = {
        "encoder_hidden_states": normal(1, 8, 32),
        "pooled_projections": normal(1, 16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)),
        "txt_ids": torch.zeros(8, 3),
    }
    return [
        fixed | {"hidden_states": normal(1, 256, 16), "timestep": torch.tensor([t], dtype=dtype)}
        for t in (0.9, 0.8, 0.7)
    ]


def test_every_phase_of_flux_has_it(flux: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    plain = library.rotary

    def counted(parts, *args, **kwargs):
        calls.append(len(parts))
        return plain(parts, *args, **kwargs)

    flux = flux.to(torch.bfloat16)
    results = {}
    for pays in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(Variants, "_rotary_pays", lambda self, x, pays=pays: pays)
        with torch.no_grad(), torch.library._scoped_library("chipmunk", "IMPL") as scope:
            scope.impl("rotary", counted, "CPU")
            ours = torch.compile(flux, backend="chipmunk", options=OPTIONS)
            results[pays] = [ours(**step, return_dict=False)[0].float() for step in steps(torch.bfloat16)]
        assert chipmunk_fx.summary(ours).phases[0] == ["refresh", "sparse", "sparse"]
        assert calls == (
            [2, 2, 1, 1, 1, 1] * 3 if pays else []
        )  # q and k of a joint block in two parts, of two single ones
    for a, b in zip(results[False], results[True], strict=True):
        assert 0 < (a - b).norm() < 0.02 * a.norm()


class TurnedBack(Block):
    """Rotates what attention gives, too: where a site was rewritten, no operator of the model's is left to look at."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        a, b = (out := F.scaled_dot_product_attention(q, k, v)).chunk(2, -1)
        angles = torch.arange(float(x.shape[1]))[None, None, :, None].expand(1, 1, -1, WIDTH // HEADS)
        out = out * angles.cos() + torch.cat((-b, a), -1) * angles.sin()
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_a_rotated_result_of_attention_stays_as_it_is():
    model = TinyDiT()
    model.blocks[0] = TurnedBack().eval()
    ours = torch.compile(model, backend="chipmunk", options=SPARSE)
    with torch.no_grad():
        for step in calls([900, 800, 700]):
            ours(*step)
    assert chipmunk_fx.summary(ours).phases[0] == ["refresh", "sparse", "sparse"]


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, ROTARY_BYTES),
        ({"inductor.mode": "reduce-overhead"}, RECORDED_ROTARY_BYTES),
        ({"lowering": "eager"}, RECORDED_ROTARY_BYTES),
    ],
)
def test_it_pays_from_a_size_on_that_tells_how_it_is_launched(options: dict[str, str], least: int):
    variants = Variants(Mock(), Mock(inputs=[]), Mock(), Config.from_options(options, None))
    for device, size, pays in (("cuda", least, True), ("cuda", least - 2, False), ("cpu", least, False)):
        x = Mock(device=torch.device(device), **{"numel.return_value": size // 2, "element_size.return_value": 2})
        assert variants._rotary_pays(x) is pays
