"""Selection by the CUDA C++ kernels: the lists of the Triton kernel, which the tests beside hold to the rules."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc, selection, tuning
from chipmunk_fx.kernels.hopper.tuning import RUN
from chipmunk_fx.kernels.triton import selection as plain
from chipmunk_fx.ops.selection import spare_places
from tests.kernels import host
from tests.kernels.cards import HOPPER

HERE = "cuda" if HOPPER else "cpu"


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the GPU: the kernel compiled for the CPU, the plain one in Triton's interpreter."""
    if HOPPER:
        return
    if torch.cuda.is_available() or host.COMPILER is None:
        pytest.skip("needs a Hopper GPU, or none and g++")
    monkeypatch.setattr(nvrtc, "kernel", host.kernel)


@dataclass(frozen=True)
class Case:
    """levels: codes that occur; fixed: rows of always-on keys; entries: batch entries with valid keys of their own."""

    keys: int
    columns: int
    drawn: int
    levels: int
    rows: int = 4
    fixed: int | None = None
    entries: int | None = None
    ragged: bool = False
    first: int = 0

    def values(self) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        step = 65535 // self.levels
        pitch = -(-self.keys // RUN) * RUN
        codes = torch.randint(0, self.levels, (self.rows, pitch), generator=generator) * step
        always = valid = spare = None
        if self.fixed is not None:
            share = 0.05 * torch.arange(1, self.fixed + 1)[:, None] / self.fixed
            always = torch.rand(self.fixed, self.keys, generator=generator) < share
        if self.entries is not None:
            valid = torch.rand(self.entries, self.keys, generator=generator) < 0.6
            valid[-1, self.columns // 2 :] = False
        if self.ragged and always is not None:
            spare = spare_places(always, valid, self.columns).int().contiguous()
        given = {"always": always, "valid": valid, "spare": spare}
        given = {name: None if x is None else x.to(HERE) for name, x in given.items()}
        some = {"drawn": self.drawn, "first": self.first, "rows_a_batch": self.rows // (self.entries or 1)}
        return codes.to(torch.uint16).to(HERE)[:, : self.keys], given | some


CASES = [
    Case(17000, 1700, 170, 65535),
    Case(17000, 1700, 170, 50),
    Case(17001, 1700, 170, 1),
    Case(4352, 896, 0, 9000, rows=552, fixed=1),
    Case(selection.LEAST, 500, 50, 700),
    Case(16500, 16000, 100, 300),
    Case(16500, 16000, 600, 300),
    Case(9000, 1, 0, 1000),
    Case(9000, 5, 5, 1000),
    Case(9008, 1400, 90, 1000, rows=6, fixed=3, first=4),
    Case(9008, 1400, 90, 1000, rows=6, fixed=3, ragged=True),
    Case(9003, 1400, 90, 1000, rows=6, fixed=3, entries=2, ragged=True),
    Case(9008, 1500, 0, 3, entries=2),
    Case(119_056, 8064, 1191, 9000, rows=700, fixed=1),
]


def long_on_cpu(*values: Any, numbers: int) -> Any:
    """Parameters of a test that ranks so many numbers."""
    return pytest.param(*values, marks=[pytest.mark.full] if numbers > 100_000 and not HOPPER else [], id=repr(values))


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("case", [long_on_cpu(case, numbers=case.rows * case.keys) for case in CASES])
def test_lists_are_those_of_the_plain_kernel(case: Case):
    codes, given = case.values()
    clock = torch.tensor([7, 1], device=HERE)
    ours, theirs = (torch.full((case.rows, case.columns), -7, dtype=torch.int32, device=HERE) for _ in range(2))
    assert selection.takes(codes, None)
    selection.select(ours, codes, None, clock, seed=11, site=5, **given)
    plain.select(theirs, codes, None, clock, seed=11, site=5, **given)
    assert torch.equal(ours, theirs)


def test_short_rows_and_fp32_go_to_the_plain_kernel():
    codes = torch.zeros(2, selection.LEAST + 16, dtype=torch.uint16)
    long = codes[:, : selection.LEAST + 1]
    assert selection.takes(long, None)
    assert not selection.takes(codes[:, : selection.LEAST - 1], None) and not selection.takes(long.float(), None)
    assert not selection.takes(long, long)
    assert not selection.takes(long.contiguous(), None)  # lines begin anywhere


SIZES = [
    (23, 12288, 3712, 614),
    (3, 12288, 4304, 0),
    (46, 3072, 512, 512),
    (5, 4097, 1, 0),
    (2, 16384, 16000, 900),
    (4, 63, 16, 3),
    (3, 20_000, 2000, 100),
]


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "nan"])
@pytest.mark.parametrize(
    ("rows", "neurons", "columns", "drawn"), [long_on_cpu(*sizes, numbers=sizes[0] * sizes[1]) for sizes in SIZES]
)
def test_neurons_are_those_of_the_plain_kernel(rows: int, neurons: int, columns: int, drawn: int, kind: str):
    generator = torch.Generator().manual_seed(0)
    means, mean = torch.randn(2, rows, neurons, generator=generator).to(HERE)
    if kind == "wide":
        means *= torch.exp(3 * mean)
    if kind == "ties":
        means, mean = (torch.round(2 * x) for x in (means, mean))
    if kind == "nan":
        means[:, ::7], mean[:, ::5] = torch.nan, -torch.inf
    ours, theirs = (torch.full((rows, columns), -7, dtype=torch.int32, device=HERE) for _ in range(2))
    given = {"drawn": drawn, "seed": 11, "site": 5}
    for step, renew in ((7, 1), (8, 0)):  # the second leaves what the first has written
        clock = torch.tensor([step, renew], device=HERE)
        selection.select_neurons(ours, means, mean, clock, **given)
        plain.select(theirs, means, mean, clock, renewed=True, **given)
        assert torch.equal(ours, theirs)


def test_as_many_neurons_as_a_cluster_holds():
    settings = [tuning.neuron_settings(n) for n in (63, 4096, 4097, 12288, 16384, 16385, 32768)]
    assert [s and s.threads for s in settings] == [64, 128, 256, 512, 512, 1024, 1024]
    assert tuning.neuron_settings(32769) is None  # counts of a cluster are kept in 16 bits
