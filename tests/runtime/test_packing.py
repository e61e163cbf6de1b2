"""Models whose lists are kept as bits, as on a GPU: every result is that of indices, in fewer bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.ops import packing
from chipmunk_fx.runtime import registry
from tests.runtime.models import TinyDiT, calls, compiled, identical, run, words
from tests.runtime.test_masks import Masked, steps

TIMES = (900, 700, 500, 300)


def dtypes(model: Any) -> set[torch.dtype]:
    """Of the lists that attention keeps."""
    (session,) = registry.sessions(model)
    caches = session.tracks[None].branches[0].caches.values()
    return {cell.tensors["lists"].dtype for sites in caches for cell in sites.values() if "rest" in cell.tensors}


def results(on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, model: Any, inputs: Any, **options: Any) -> Any:
    """Results, dtypes of the lists, and the summary, where devices of the types `on` keep bits."""
    monkeypatch.setattr(packing, "BITS_ON", on)
    ours = compiled(model, **options)
    return [out for call in inputs for out in run(ours, call)], dtypes(ours), chipmunk_fx.summary(ours)


KEEPING = {"attention__renew_lists": False}


WITH_INDUCTOR = pytest.param(KEEPING | {"lowering": "inductor"}, marks=pytest.mark.full)


@pytest.mark.parametrize("options", [{}, KEEPING | {"memory__offload": "all"}, WITH_INDUCTOR], ids=repr)
def test_bits_change_no_result(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    options = options | {"schedule__refresh_every": 2, "mlp__enabled": False}
    inputs = [calls(TIMES, [words(1), words(2)], seed=seed, side=side) for seed, side in ((0, 16), (1, 16), (2, 32))]
    want, indices, beside = results((), monkeypatch, TinyDiT(2), inputs, **options)
    got, bits, summary = results(("cpu",), monkeypatch, TinyDiT(2), inputs, **options)
    assert (indices, bits) == ({torch.int16}, {torch.uint8})
    assert identical(got, want) and summary.phases == beside.phases and summary.flops_ratio == beside.flops_ratio
    assert [site.density for site in summary.sites] == [site.density for site in beside.sites]
    assert summary.cache_bytes < beside.cache_bytes


@pytest.mark.parametrize("lengths", [(5,), (7, 3)])
def test_bits_behind_a_mask(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]):
    """What a span cuts off has its place in a line all the same."""
    want, _, _ = results((), monkeypatch, Masked(), [steps(lengths)])
    got, bits, _ = results(("cpu",), monkeypatch, Masked(), [steps(lengths)])
    assert bits == {torch.uint8} and identical(got, want)


def test_what_is_held_follows_the_account(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "BITS_ON", ("cpu",))
    ours = compiled(TinyDiT(), mlp__enabled=False)
    run(ours, calls(TIMES))
    (site,) = [site for site in chipmunk_fx.summary(ours).sites if site.status == "rewritten"]
    # 2 heads of 5 groups of 16 rows in 72; a line of 16 bytes, and one byte for each of 32 columns in a list
    assert site.caches["lists"] == 2 * 5 * 16 + 32
    (session,) = registry.sessions(ours)
    held: list[Tensor] = [
        cell.tensors["lists"] for s in session.tracks[None].branches[0].caches.values() for cell in s.values()
    ]
    assert [x.untyped_storage().nbytes() for x in held] == [site.caches["lists"]]
