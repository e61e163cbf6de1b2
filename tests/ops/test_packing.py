"""Lists of columns as bits and as 16-bit indices: they come back as they were, and the operators do not see a difference."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk_fx.kernels import choose, triton
from chipmunk_fx.ops.cases import ATTENTION_CASES, AttentionCase, call
from chipmunk_fx.ops.library import REFERENCE, implementation
from chipmunk_fx.ops.packing import PLAIN, Bits, Kept, line_bytes, smallest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {"reference": PLAIN, "triton": Bits(triton.pack_bits, triton.unpack_bits)}
ways = pytest.mark.parametrize("bits", BITS.values(), ids=list(BITS))


def random_lists(lines: int, keys: int, columns: int, present: int, seed: int) -> Tensor:
    """int32 [lines, columns]: `present` random columns (up to so many where `seed` is odd), and `keys` in the places left."""
    generator = torch.Generator().manual_seed(seed)
    listed = torch.full((lines, columns), keys, dtype=torch.int32)
    for line in listed:
        some = int(torch.randint(0, present + 1, (), generator=generator)) if seed % 2 else present
        line[:some] = torch.randperm(keys, generator=generator)[:some].sort().values
    return listed.to(DEVICE)


def back(listed: Tensor, keys: int, bits: Bits) -> Tensor:
    """Packed into bytes that hold something else before, and unpacked."""
    packed = torch.full((len(listed), line_bytes(keys)), 0xA5, dtype=torch.uint8, device=DEVICE)
    found = torch.full_like(listed, -1)
    bits.pack(listed, packed, keys)
    bits.unpack(packed, found, keys)
    return found


@ways
@settings(max_examples=40, deadline=None)
@given(data=st.data(), keys=st.integers(1, 700), lines=st.integers(1, 4), seed=st.integers(0, 99))
def test_bits_come_back_as_lists(bits: Bits, data: st.DataObject, keys: int, lines: int, seed: int):
    columns = data.draw(st.integers(1, keys))
    present = data.draw(st.integers(0, columns))
    listed = random_lists(lines, keys, columns, present, seed)
    assert torch.equal(back(listed, keys, bits), listed)


@ways
@pytest.mark.parametrize(
    ("keys", "columns", "present"),
    [(65535, 300, 300), (65537, 2000, 1999), (70001, 5, 0), (40_000, 3000, 2000), (1500, 1500, 1500), (33, 33, 32)],
)
def test_long_lines_come_back(bits: Bits, keys: int, columns: int, present: int):
    listed = random_lists(2, keys, columns, present, 0)
    listed[1, :present] = torch.arange(present)  # words that are full
    assert torch.equal(back(listed, keys, bits), listed)


@given(keys=st.integers(1, 200_000), share=st.floats(0.001, 1), device=st.sampled_from(["cpu", "cuda"]))
@example(keys=65535, share=1.0, device="cpu")
@example(keys=65536, share=1.0, device="cpu")
def test_nothing_is_smaller(keys: int, share: float, device: str):
    columns = max(1, int(share * keys))
    shape, dtype = smallest((2, 3, 5, columns), keys, device)
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    sizes = {torch.int32: 120 * columns, torch.int16: 60 * columns, torch.uint8: 30 * line_bytes(keys) + columns}
    if keys > 65535:
        del sizes[torch.int16]
    if device == "cpu":
        del sizes[torch.uint8]
    assert size == sizes[dtype] == min(sizes.values())


@pytest.mark.parametrize("columns", [1, 700, 65535])
def test_16_bits_hold_every_column_and_none(columns: int):
    listed = torch.arange(65536 - columns, 65536, dtype=torch.int32).view(1, 1, 1, columns)
    kept = Kept(torch.zeros(listed.shape, dtype=torch.int16), (1, 1, 1, columns), 65535)
    kept.pack(listed, 65535, PLAIN)
    assert torch.equal(kept.unpacked(65535, PLAIN), listed)


def steps(case: AttentionCase, run: dict[str, Callable[..., Tensor]], dtype: torch.dtype | None) -> list[Tensor]:
    """Results and caches of a refresh, a sparse step, a refresh that keeps its lists and one more sparse step."""
    values = case.values(torch.float32, DEVICE)
    if dtype is not None:
        given = values["lists"].shape
        lines = given[:3].numel() * line_bytes(case.keys)
        shape = (lines + case.columns,) if dtype == torch.uint8 else given
        values["lists"] = torch.full(shape, 77, dtype=dtype, device=DEVICE)
    if case.present == (90,) * case.batch:
        valid = torch.zeros(case.batch, case.keys, dtype=torch.bool, device=DEVICE)
        valid[:, 13:103] = True
        values |= {"span": torch.tensor([13, 103]), "valid": valid}
    results = []
    for seed, (op, renew) in enumerate([("refresh", True), ("sparse", True), ("refresh", False), ("sparse", True)]):
        values |= case.projections(torch.float32, DEVICE, seed) | {"renew": renew}
        before = values["lists"].clone()
        args, kwargs = call(f"attention_{op}", values)
        results += [run[op](*args, **kwargs), values["rest"].clone(), values["share"].clone()]
        assert torch.equal(before, values["lists"]) != (seed == 0)
    return results


LONG = [pytest.mark.full] if DEVICE == "cpu" else []  # in an interpreter of kernels
CASES = [
    *(ATTENTION_CASES[i] for i in (2, 13)),
    *(pytest.param(ATTENTION_CASES[i], marks=LONG) for i in (1, 3, 6, 11)),
    replace(ATTENTION_CASES[2], rows=64, keys=111, layout="tokens_first", columns=48, present=(90,), fixed=5),
]


@pytest.mark.parametrize(("way", "dtype"), [*((way, torch.uint8) for way in BITS), ("reference", torch.int16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_operators_on_packed_lists(case: AttentionCase, way: str, dtype: torch.dtype):

    def chosen(op: str, given: Mapping[str, Any]) -> Callable[..., Tensor]:
        return REFERENCE[op] if way == "reference" else choose(op, given, (triton,))[0]

    run = {op: implementation(f"attention_{op}", chosen, BITS[way]) for op in ("refresh", "sparse")}
    for got, want in zip(steps(case, run, dtype), steps(case, run, None), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("op", ["attention_refresh", "attention_sparse"])
def test_opcheck(op: str, dtype: torch.dtype):
    case = ATTENTION_CASES[1]
    values: dict[str, Any] = case.values(torch.float32) | {"rest": torch.zeros(3, 2, 63, 40)}
    values["share"].fill_(0.5)
    lines = values["lists"].shape[:3].numel()
    shape = (lines * line_bytes(63) + 20,) if dtype == torch.uint8 else values["lists"].shape
    values["lists"] = torch.zeros(shape, dtype=dtype)
    if dtype == torch.uint8:
        PLAIN.pack(torch.arange(20).int().expand(lines, 20), values["lists"][:-20].view(lines, -1), 63)
    positional, keywords = call(op, values)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.chipmunk, op).default, tuple(positional), keywords, test_utils=tests)
