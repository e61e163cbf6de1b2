"""What single blocks do by attention.layers and mlp.layers."""

from typing import Any

import pytest
import torch

import chipmunk_fx
from tests.graph.capturing import captured_tiny
from tests.runtime.models import SPARSE, TinyDiT, assert_same, calls, compiled, run
from tests.runtime.test_pieces import TOLD, blockwise

TIMES = (900, 700, 500)
DENSE, PHASES = {0: ["dense"] * 3}, {0: ["refresh", "sparse", "sparse"]}
# of 72 keys: 15, 29 or all of them, one at random, eight of text, in tiles of 16
CHOSEN: dict[str, Any] = {"attention.layers": {0: 0.2, "1-2": "dense", "3": 1.0}, "attention.density": 0.4}


def shares(model: Any, kind: str = "attention") -> list[float]:
    return [site.density for site in chipmunk_fx.summary(model).sites if site.kind == kind]


def test_plans_follow_what_is_said_of_a_block():
    plan = captured_tiny(depth=4).plan(
        attention__layers={0: 0.2, "1-2": "dense"}, attention__dense_layers=3, mlp__dense_layers=0
    )
    reasons = {(site.kind, site.layer): (site.status, site.reason) for site in plan.sites}
    assert reasons["attention", 0] == ("rewritten", "density 0.2 for block 0 (attention.layers)")
    assert [reasons["attention", i] for i in (1, 2)] == [("dense", f"block {i} (attention.layers)") for i in (1, 2)]
    assert all(reasons["mlp", i] == ("rewritten", "") for i in range(4))
    assert reasons["attention", 3] == ("rewritten", "")


def test_each_block_has_its_own_density():
    ours = compiled(TinyDiT(depth=5), **{key.replace(".", "__"): value for key, value in CHOSEN.items()})
    run(ours, calls(TIMES))
    summary = chipmunk_fx.summary(ours)
    assert shares(ours) == [32 / 72, 1.0, 1.0, 1.0, 48 / 72]
    attention = [site for site in summary.sites if site.kind == "attention"]
    assert [site.status for site in attention] == ["rewritten", "dense", "dense", "rewritten", "rewritten"]
    plain = compiled(TinyDiT(depth=5), attention__density=0.4)
    run(plain, calls(TIMES))
    assert summary.flops_ratio > chipmunk_fx.summary(plain).flops_ratio


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_blocks_compiled_one_by_one_follow_too(lowering: str):
    """One compiled graph serves blocks with lists of different length."""
    options = SPARSE | TOLD | CHOSEN | {"lowering": lowering, "mlp.enabled": False}
    model = blockwise(TinyDiT(depth=5), options)
    got = run(model, calls(TIMES))
    sites = [site for site in chipmunk_fx.summary(model).sites if site.kind == "attention"]
    assert [site.phases for site in sites] == [PHASES, DENSE, DENSE, PHASES, PHASES]
    assert [site.reason for site in sites[1:3]] == [
        f"block {i} is dense as a whole, by attention.layers" for i in (1, 2)
    ]
    assert [site.status for site in sites] == ["rewritten", "dense", "dense", "rewritten", "rewritten"]
    # a block does not know which of its columns are text
    assert [site.density for site in sites if site.phases == PHASES] == [16 / 72, 1.0, 32 / 72]
    torch._dynamo.reset()
    whole = torch.compile(
        TinyDiT(depth=5), backend="chipmunk", options=options | {"lowering": "eager", "tokens.order": "raster"}
    )
    want = run(whole, calls(TIMES))
    assert_same(got[:1], want[:1])
    assert (got[2] - want[2]).norm() < 0.1 * want[2].norm()


def test_a_block_compiled_alone_says_which_setting_keeps_all_of_it_dense():
    options = SPARSE | TOLD | {"attention.dense_layers": 1, "mlp.dense_layers": 2}
    model = blockwise(TinyDiT(depth=3), options)
    run(model, calls(TIMES))
    first, _, attention, mlp, *others = chipmunk_fx.summary(model).sites
    assert first.reason == "block 0 is dense as a whole, by attention.dense_layers and mlp.dense_layers"
    assert attention.reason == mlp.reason == "block 1 is dense as a whole, by mlp.dense_layers"
    assert (attention.status, attention.phases, attention.density) == ("dense", DENSE, 1.0)
    assert [(site.status, site.reason, site.phases) for site in others] == [("rewritten", "", PHASES)] * 2
