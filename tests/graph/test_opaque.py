"""Attention by an operator of another library, and experts in grouped products, are named and left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chipmunk_fx


@torch.library.custom_op("elsewhere_flash_attn::forward", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, N, H, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("elsewhere_flash_attn::rotate", mutates_args=())
def rotate(x: Tensor) -> Tensor:
    return x.flip(-1)


@rotate.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Model(nn.Module):
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.qkv, self.plain = nn.Linear(16, 48), plain

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        q = rotate(q)
        if self.plain:
            return torch._scaled_dot_product_flash_attention_for_cpu(*(t.transpose(1, 2) for t in (q, k, v)))[0]
        return flash(q, k, v, 0.3).flatten(2)


@pytest.mark.parametrize(
    ("plain", "name"), [(False, "elsewhere_flash_attn.forward"), (True, "aten._scaled_dot_product_flash_attention_for")]
)
def test_an_opaque_attention_is_refused_by_name(plain: bool, name: str):
    torch._dynamo.reset()
    (site,) = chipmunk_fx.explain(Model(plain), torch.randn(1, 24, 16)).sites
    assert (site.kind, site.form, site.accepted, site.status) == ("attention", "opaque", False, "dense")
    assert site.reason.startswith(name) and "is opaque" in site.reason


class Experts(nn.Module):
    """Two experts, each for the half of the rows that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 16, 64)), nn.Parameter(torch.randn(2, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ends = torch.tensor([len(rows) // 2, len(rows)], dtype=torch.int32)
        gate, up = F.grouped_mm(rows, self.first, offs=ends).chunk(2, -1)
        return x + F.grouped_mm(F.silu(gate) * up, self.second, offs=ends).view_as(x)


def test_experts_in_grouped_products_are_listed():
    torch._dynamo.reset()
    model = nn.Sequential(Experts(), Experts()).bfloat16()
    sites = chipmunk_fx.explain(model, torch.randn(1, 24, 16, dtype=torch.bfloat16)).sites
    assert [(s.name, s.kind, s.form, s.accepted) for s in sites] == [(str(i), "mlp", "experts", False) for i in (0, 1)]
    assert all("experts in one grouped product" in site.reason for site in sites)


class Batched(nn.Module):
    """Every expert reads every row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bnc,ecf->benf", x, self.first))
        return x + torch.einsum("benf,efc->benc", hidden, self.second).mean(1)


class Picked(Batched):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (4, 6)).transpose(0, 1).flatten(1, 2)
        return x + torch.bmm(F.silu(torch.bmm(rows, self.first)), self.second).view_as(x)


@pytest.mark.parametrize("kind", [Batched, Picked])
def test_experts_in_batched_products_are_listed(kind: type[nn.Module]):
    torch._dynamo.reset()
    (site,) = chipmunk_fx.explain(kind(), torch.randn(1, 24, 16)).sites
    assert (site.kind, site.form, site.accepted) == ("mlp", "experts", False)
    assert "experts in batched products" in site.reason
