"""Tensors that the host reads stay there where torch.set_default_device names another device."""

import torch
import torch.nn.functional as F
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.graph.geometry import grids_of_ids
from chipmunk_fx.runtime import known, tables
from chipmunk_fx.runtime.observe import Observer
from chipmunk_fx.state.store import Store
from tests.graph.capturing import captured_tiny
from tests.runtime.models import HEADS, SPARSE, Block, chipmunk, identical, run

OPTIONS = SPARSE | {
    "schedule.steps": 4,
    "schedule.branches": 1,
    "schedule.refresh_every": 2,
    "attention.renew_lists": False,
    "attention.local_window": 0.1,
    "attention.local_voxels": 3,
    "tokens.grid": (1, 8, 8),
    "tokens.text": ("first", 8),
}


class Traced(Block):
    """Without `unflatten`, at which Dynamo breaks the graph where there is a default device."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_a_block_runs_as_it_does_without():
    first, second = Traced(), Traced()
    second.load_state_dict(first.state_dict())
    torch._dynamo.reset()
    steps = [(torch.randn(1, 72, 32),) for _ in range(4)]
    want = run(chipmunk(first, options=OPTIONS), steps)
    torch._dynamo.reset()
    tables.attention_tables.cache_clear()
    twin = chipmunk(second, fullgraph=True, options=OPTIONS)
    with torch.device("meta"):
        assert identical(run(twin, steps), want)
    assert chipmunk_fx.summary(twin).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


def test_masks_timesteps_and_lanes_are_told_on_the_host():
    seen, mask = captured_tiny(), torch.arange(12)[None] < 7
    with torch.device("meta"):
        (padding,) = known.understand([mask], {}).paddings
        assert padding.span.tolist() == [0, 7]
        assert Observer().observe(seen.roles, seen.inputs).whole().timestep == (900.0,)
        assert Store().lanes(torch.device("cpu"), 2).device.type == "cpu"


def test_the_grid_is_found():
    seen = captured_tiny()
    ids = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    want = seen.geometry()
    with torch.device("meta"):
        assert grids_of_ids(ids) == ((1, 4, 6),)
        assert seen.geometry() == want
