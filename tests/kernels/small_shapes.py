"""Run every kernel once or more on small shapes, in which a block still has several tiles; for tools that watch each access.

    compute-sanitizer python -P tests/kernels/small_shapes.py [--every-lane]

--every-lane: stages of second_fp8.cu are given back by each lane that has read them, not by one lane for its warp. racecheck
sees no other order of a lane's reads and of what waits at a barrier: not even behind a named barrier of all that read.

Prints a line a kernel and setting. Without a GPU, in Triton's interpreter (TRITON_INTERPRET=1), Triton's kernels alone.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # last: a folder of ours has the name of a distribution

from chipmunk_fx.kernels import BACKENDS, devices, triton
from chipmunk_fx.kernels.hopper import mlp, nvrtc
from chipmunk_fx.kernels.triton import watching
from chipmunk_fx.ops.cases import AttentionCase, MlpCase, arguments
from chipmunk_fx.ops.library import REFERENCE
from chipmunk_fx.ops.packing import line_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = 8  # multiprocessors that the kernels are told of: the blocks of a cluster at most
BF16, F16 = torch.bfloat16, torch.float16
WIDE = AttentionCase(rows=900, keys=300, width=128, group_rows=192, columns=140, fixed=9, grouped=850, mass_stride=4)
NARROW = AttentionCase(rows=600, keys=260, width=64, group_rows=128, columns=131, batch=2, key_heads=1, mass_stride=8)
ATTENTION = (
    (BF16, WIDE),
    (BF16, replace(WIDE, near=70, again=True)),
    (F16, replace(WIDE, batch=2, present=(270, 30))),
    (BF16, replace(NARROW, layout="fused", keys=600, key_heads=None)),
    (F16, replace(NARROW, again=True)),
    (BF16, replace(NARROW, width=128, columns=260)),
    (BF16, replace(WIDE, width=64, group_rows=384, again=True)),
    (BF16, AttentionCase(rows=384, keys=4200, width=64, group_rows=192, columns=300, heads=1, mass_stride=4, fixed=5)),
)
MLP = MlpCase(lead=(2, 500), width=512, neurons=700, group_rows=192, columns=333, result=384, ordered=True)
GATED = replace(MLP, gated=True, activation="silu")
MLPS = (
    (BF16, MLP),
    (F16, replace(MLP, group_rows=128, result=128, activation="relu2", biased=False)),
    (BF16, replace(MLP, lead=(1700,), columns=160, result=320, activation="gelu")),
    (BF16, GATED),
    (F16, replace(GATED, group_rows=256, result=448, narrow=True)),
    (BF16, replace(MLP, fp8=True)),
    (BF16, replace(MLP, group_rows=128, result=64, fp8=True)),
    (BF16, replace(GATED, group_rows=384, result=256, fp8=True, biased=False)),
)


def launched() -> dict[str, None]:
    """Names and settings of the kernels that are launched from now on."""
    seen: dict[str, None] = {}
    compiled, jitted = nvrtc.kernel, type(watching._watch)  # the interpreter's functions are of another class
    run = jitted.run

    def kernel(name: str, source: Any, device: int, settings: Any, *more: str, **options: int) -> Any:
        seen[f"{name} {settings}"] = None
        return compiled(name, source, device, settings, *more, **options)

    def jit(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[self.fn.__name__] = None
        return run(self, *args, **kwargs)

    nvrtc.kernel, jitted.run = kernel, jit  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def call(op: str, values: dict[str, Any], reference: bool = False) -> None:
    """By every backend that takes it, or the reference alone; caches are left as the last one leaves them."""
    given = arguments(op, values)
    if reference:
        REFERENCE[op](**given)
        return
    taking = [backend for backend in BACKENDS if backend.supports(op, given) is None]
    assert taking, op
    for backend in taking:
        out = getattr(backend, op)(**given)
        assert out is None or out.isfinite().all(), (op, backend.name)


def attend(dtype: torch.dtype, case: AttentionCase) -> None:
    values = case.values(dtype, DEVICE)
    call("attention_refresh", values)
    call("attention_refresh", values | {"renew": False})
    call("attention_sparse", values)
    lists = values["lists"].flatten(0, 2)
    bits = torch.zeros(len(lists), line_bytes(case.keys), dtype=torch.uint8, device=DEVICE)
    triton.pack_bits(lists, bits, case.keys)
    triton.unpack_bits(bits, lists, case.keys)
    turned(values["q"])


def turned(q: Tensor) -> None:
    angles = [q.float()[:1, :1]]
    triton.rotary(parts=[q], weights=[q[0, 0, 0]], cos=angles, sin=angles, eps=1e-6, dim=2, paired=True)


def multiply(dtype: torch.dtype, case: MlpCase) -> None:
    values = case.values(dtype, DEVICE)
    values["hidden"].zero_()  # what no row belongs to is not looked at
    reference = case.fp8 and DEVICE == "cpu"
    call("mlp_refresh", values, reference)
    for renew in (1, 0):
        values["clock"][1] = renew
        values["x"] = case.tokens(dtype, DEVICE, seed=renew)
        call("mlp_sparse", values, reference)
    broken = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    call("cache_watch", {"cache": values["out"], "broken": broken, "columns": case.result})
    assert not broken.item()


def give_back_by_every_lane() -> None:
    source = mlp.source
    pairs = (
        ("if (lane < CLUSTER) barrier_arrive_at(shared.empty + slot * 8, lane);",
         "for (u32 rank = 0; rank < CLUSTER; rank++) barrier_arrive_at(shared.empty + slot * 8, rank);"),
        ("barrier_init(shared.empty + i * 8, 4 * CONSUMERS * CLUSTER)",
         "barrier_init(shared.empty + i * 8, 128 * CONSUMERS * CLUSTER)"),
    )  # fmt: skip

    def changed(settings: Any, file: str) -> str:
        text = source(settings, file)
        for one, every in pairs if file == "second_fp8.cu" else ():
            assert one in text
            text = text.replace(one, every)
        return text

    mlp.source = changed


def main(*options: str) -> None:
    if "--every-lane" in options:
        give_back_by_every_lane()
    seen = launched()
    devices.units = lambda device: UNITS  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for dtype, case in ATTENTION:
            attend(dtype, case)
        for dtype, case in MLPS:
            multiply(dtype, case)
    print(*seen, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
