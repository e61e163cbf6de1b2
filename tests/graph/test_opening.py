"""What a graph holds as one call is written out where its formula is known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chipmunk_fx.graph.opening import encoder_layer
from tests.graph.capturing import captured
from tests.harness.hand_models import FusedAttention


class Saved(nn.Module):
    """An attention under a checkpoint under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FusedAttention(16, 2)

    def once(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False).sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.once, x, use_reentrant=False)


def test_a_checkpoint_is_its_body():
    model, x = Saved(), torch.randn(2, 24, 16)
    seen = captured(model, x)
    assert [c.name for c in seen.candidates] == ["inner"]
    inputs = [value for value in seen.inputs if isinstance(value, torch.Tensor)]
    with torch.no_grad():
        torch.testing.assert_close(seen.capture.module(*inputs)[0], model(x))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_an_encoder_layer_is_what_its_kernel_computes(norm_first: bool, activation, padded: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, norm_first=norm_first).eval()
    x, attention = torch.randn(2, 24, 16), layer.self_attn
    given = (
        *(
            x,
            16,
            2,
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj.weight,
            attention.out_proj.bias,
        ),
        *(activation is F.gelu, norm_first, layer.norm1.eps),
        *(layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias),
        *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias),
    )
    mask = (torch.arange(24) > 17).expand(2, -1) if padded else None
    ours = encoder_layer(*given, mask, 1 if padded else None)
    torch.testing.assert_close(ours, layer(x, src_key_padding_mask=mask))


def test_an_encoder_layer_shows_its_attention_and_its_mlp():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    found = [(c.kind, c.form) for c in captured(layer, torch.randn(2, 24, 16)).candidates if c.operands]
    assert found == [("attention", "self"), ("mlp", "relu")]


class Gated(nn.Module):
    """One linear whose halves are a value and its sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.glu(self.both(x), dim=-1)) + F.glu(x, 1).sum()


def test_a_gated_linear_unit_is_its_formula():
    model, x = Gated(), torch.randn(2, 24, 16)
    seen = captured(model, x)
    assert [(c.form, c.reason) for c in seen.candidates] == [("chunked gated sigmoid", None)]
    inputs = [value for value in seen.inputs if isinstance(value, torch.Tensor)]
    with torch.no_grad():
        torch.testing.assert_close(seen.capture.module(*inputs)[0], model(x))
