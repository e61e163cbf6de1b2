"""Norm and rotary embedding in one operator agree with what models write, in every layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.kernels import choose, triton
from chipmunk_fx.ops.cases import largest_error, tolerance
from chipmunk_fx.ops.rotary import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """rows: of each part; normed, turned: which parts are; by_head: every head has angles of its own, else all have the same.

    whole: norms are over all heads; shared: angles have a column for each pair.
    """

    rows: tuple[int, ...]
    width: int
    heads: int = 3
    batch: int = 1
    dim: int = 1
    paired: bool = True
    normed: tuple[bool, ...] = (True, True)
    turned: tuple[bool, ...] = (True, True)
    by_head: bool = False
    strided: bool = False
    whole: bool = False
    shared: bool = False

    def values(self, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, dtype=of, device=DEVICE, generator=generator)

        def part(rows: int) -> Tensor:
            x = normal(self.batch, rows, self.heads, self.width * (2 if self.strided else 1))[..., : self.width]
            return x if self.dim == 1 else x.transpose(1, 2)

        def angles(rows: int) -> Tensor:
            columns = self.width // 2 if self.shared else self.width
            a = normal(1, rows, self.heads if self.by_head else 1, columns, of=torch.float32)
            return a if self.dim == 1 else a.transpose(1, 2)

        count = len(self.rows)
        return {
            "parts": [part(rows) for rows in self.rows],
            "weights": [
                normal(self.width * (self.heads if self.whole else 1)) if on else None for on in self.normed[:count]
            ],
            "cos": [angles(r) if on else None for r, on in zip(self.rows, self.turned, strict=False)],
            "sin": [angles(r) if on else None for r, on in zip(self.rows, self.turned, strict=False)],
            "eps": EPS,
            "dim": self.dim,
            "paired": self.paired,
        }


CASES = (
    Case(rows=(200,), width=128),
    Case(rows=(40, 111), width=64, batch=2),
    Case(rows=(111,), width=72, dim=2, paired=False),
    Case(rows=(63, 5), width=96, dim=2, turned=(True, False)),
    Case(rows=(17, 30), width=40, normed=(True, False), paired=False, strided=True),
    Case(rows=(33,), width=256, by_head=True, batch=3),
    Case(rows=(70,), width=80, paired=False, by_head=True, dim=2),
    Case(rows=(3, 2), width=8, heads=1, normed=(False, False)),
    Case(rows=(45,), width=128, heads=40, whole=True, shared=True),
    Case(rows=(61, 30), width=40, heads=5, whole=True, normed=(True, False), dim=2, batch=2),
    Case(rows=(33, 8), width=24, heads=8, whole=True, paired=False, shared=True, by_head=True, strided=True),
    Case(rows=(50,), width=64, shared=True, by_head=True, dim=2),
    Case(rows=(7,), width=2, heads=3, whole=True, shared=True),
)


def written_out(values: dict[str, Any]) -> Tensor:
    """As models have it: the norm rounded to their dtype, the rotation of that in the dtype of the angles."""
    done = []
    for x, weight, cos, sin in zip(*(values[name] for name in ("parts", "weights", "cos", "sin")), strict=True):
        y = x if weight is None else normed(x, weight, values["dim"])
        if cos is not None and 2 * cos.shape[-1] == x.shape[-1]:
            y = turned_in_halves(y, cos, sin, values["paired"])
        elif cos is not None:
            if values["paired"]:
                a, b = y.reshape(*y.shape[:-1], -1, 2).unbind(-1)
                turned = torch.stack([-b, a], -1).flatten(3)
            else:
                a, b = y.chunk(2, -1)
                turned = torch.cat([-b, a], -1)
            y = (y.to(cos.dtype) * cos + turned.to(cos.dtype) * sin).to(x.dtype)
        done.append(y)
    return torch.cat(done, values["dim"])


def normed(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    if len(weight) == x.shape[-1]:
        return F.rms_norm(x, weight.shape, weight, EPS)
    tokens = x if dim == 1 else x.transpose(1, 2)
    y = F.rms_norm(tokens.flatten(2), weight.shape, weight, EPS).view(tokens.shape)
    return y if dim == 1 else y.transpose(1, 2)


def turned_in_halves(y: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    a, b = (t.to(cos.dtype) for t in (y.unflatten(-1, (-1, 2)).unbind(-1) if paired else y.chunk(2, -1)))
    turned = [(a * cos - b * sin).to(y.dtype), (a * sin + b * cos).to(y.dtype)]
    return torch.stack(turned, -1).flatten(3) if paired else torch.cat(turned, -1)


def in_fp64(values: dict[str, Any]) -> dict[str, Any]:
    wide = {n: [t if t is None else t.double() for t in values[n]] for n in ("parts", "weights", "cos", "sin")}
    return values | wide


@pytest.mark.parametrize("function", [rotary, triton.rotary], ids=["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_it_is_what_models_write(function: Callable[..., Tensor], dtype: torch.dtype, case: Case):
    values = case.values(dtype)
    out, plain, exact = function(**values), written_out(values), written_out(in_fp64(values))
    assert out.shape == plain.shape
    assert out.dtype == dtype
    assert (out if case.dim == 1 else out.transpose(1, 2)).is_contiguous()
    assert largest_error(out, exact) <= tolerance(plain, exact)


def strided_weight(values: dict[str, Any]) -> None:
    values["weights"] = [weight.repeat_interleave(2)[::2] for weight in values["weights"]]


def one_angle_a_row(values: dict[str, Any]) -> None:
    values["cos"] = [cos[..., :1] for cos in values["cos"]]


def no_rows(values: dict[str, Any]) -> None:
    for name in ("parts", "cos", "sin"):
        values[name][0] = values[name][0][:, :0]


@pytest.mark.parametrize("change", [strided_weight, one_angle_a_row, no_rows])
def test_the_kernel_takes_what_the_formula_takes(change: Callable[[dict[str, Any]], None]):
    values = CASES[1].values(torch.float32)
    change(values)
    torch.testing.assert_close(triton.rotary(**values), rotary(**values))


def test_the_operator_tells_its_result_in_advance():
    values = CASES[3].values(torch.bfloat16)
    names = ("parts", "weights", "cos", "sin")
    torch.library.opcheck(
        torch.ops.chipmunk.rotary.default,
        tuple(values[name] for name in names),
        {name: values[name] for name in ("eps", "dim", "paired")},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_kernel_is_chosen_by_batch_width_and_dtype():
    values = CASES[0].values(torch.float32)
    assert choose("rotary", values, [triton])[1] == "triton"
    (x,) = values["parts"]
    for odd in ([x.double()], [x.repeat(1, 1, 1, 3)], [x[..., :63]], [x.expand(65536, -1, -1, -1)]):
        assert choose("rotary", values | {"parts": odd}, [triton])[1] == "reference"
    assert choose("rotary", values | {"weights": [x.new_ones(200 * 128)]}, [triton])[1] == "reference"
