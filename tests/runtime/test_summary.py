"""What a summary says of work done: every number worked out by hand once."""

import pytest

import chipmunk_fx
from chipmunk_fx.runtime.summary import site_flops
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import captured_tiny
from tests.runtime.models import TinyDiT, calls, compiled, run

TIMES = (900, 700, 500)
OFF = {"gate": "off", "attention__dense_layers": 0, "mlp__dense_layers": 0}


@pytest.fixture(scope="module")
def plan():
    return captured_tiny().plan(**OFF)


def test_operations_of_a_site(plan):
    attention, mlp = plan.sites
    dense = 4 * 2 * 72 * 72 * 16
    assert site_flops(attention, Phase.DENSE, 0.25, 4) == dense
    assert site_flops(attention, Phase.SPARSE, 0.25, 4) == dense / 4
    assert site_flops(attention, Phase.REFRESH, 0.25, 4) == dense * (1 + 1 / 8 + 1 / 4)
    dense = 2 * 72 * 128 * (32 + 32)
    assert [site_flops(mlp, phase, 0.5, 4) for phase in (Phase.DENSE, Phase.REFRESH, Phase.SPARSE)] == [
        dense,
        dense,
        dense / 2,
    ]


def test_operations_of_a_generation(plan):
    model = compiled(TinyDiT())
    run(model, calls(TIMES))
    summary = chipmunk_fx.summary(model)
    attention, mlp = summary.sites
    # 12 of 72 keys by mass, 1 at random, 8 of text: two tiles of 16; 39 of 128 neurons and 7 at random: three.
    assert (attention.density, mlp.density) == (32 / 72, 48 / 128)
    a, m = (site.dense_flops for site in plan.sites)
    refresh = plan.rest_flops + a * (1 + 1 / 8 + attention.density) + m
    sparse = plan.rest_flops + a * attention.density + m * mlp.density
    assert summary.flops_ratio == pytest.approx((refresh + 2 * sparse) / (3 * plan.total_flops))


def test_bytes_of_a_generation():
    model = compiled(TinyDiT())
    run(model, calls(TIMES))
    attention, mlp = chipmunk_fx.summary(model).sites
    groups = 5  # of 16 rows in 72
    assert attention.cache_bytes == 4 * (2 * 72 * 16 + 2 * 72 + 2 * groups * 32)  # rest, share, lists
    # hidden, out, mean, lists, by_neuron
    assert mlp.cache_bytes == 4 * (groups * 128 * 16 + 72 * 32 + groups * 128 + groups * 48 + 128 * 32)
