"""The operators as PyTorch sees them: schema, fakes, Inductor, the choice of a backend."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from chipmunk_fx import kernels
from chipmunk_fx.ops.cases import ATTENTION_CASES, MLP_CASES, AttentionCase, MlpCase, arguments, call
from chipmunk_fx.ops.library import REFERENCE, argument_names, implementation

CASES = [
    *(("attention_refresh", case) for case in ATTENTION_CASES[:7] + ATTENTION_CASES[9:12]),
    *(("attention_sparse", case) for case in ATTENTION_CASES[:7] + ATTENTION_CASES[9:12]),
    *(("mlp_refresh", case) for case in MLP_CASES[:7] + MLP_CASES[-1:]),
    *(("mlp_sparse", case) for case in MLP_CASES[:7] + MLP_CASES[-1:]),
]


def refreshed(op: str, case: AttentionCase | MlpCase, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of `op` with caches as a refresh leaves them."""
    values = case.values(dtype)
    first = f"{op.split('_')[0]}_refresh"
    REFERENCE[first](**arguments(first, values))
    if "hidden" in values:
        values["hidden"].nan_to_num_()  # opcheck compares with ==
    return values


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_opcheck(op: str, case: AttentionCase | MlpCase):
    positional, keywords = call(op, refreshed(op, case))
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    if positional[-2] is None or not op.startswith("mlp"):  # it compares with what PyTorch does not have for e4m3
        tests = ("test_schema", *tests)
    torch.library.opcheck(getattr(torch.ops.chipmunk, op).default, tuple(positional), keywords, test_utils=tests)


@pytest.mark.parametrize("phase", ["refresh", "sparse"])
def test_inductor_runs_an_attention_site_without_copies(phase: str):
    """qkv projection -> op -> output projection: products and views, no kernel that moves data, caches in place."""
    case = AttentionCase(rows=96, keys=96, width=16, group_rows=32, columns=24, heads=4)
    values = refreshed("attention_sparse", case)
    x, fused, last = torch.randn(1, 96, 64), torch.randn(192, 64) / 8, torch.randn(64, 64) / 8
    op = f"attention_{phase}"
    names, keywords = argument_names(op), call(op, values)[1]
    caches = [values[name] for name in ("rest", "share", "lists")]
    expected, given = [cache.clone() for cache in caches], [cache.clone() for cache in caches]

    def site(x: Tensor, clock: Tensor, rest: Tensor, share: Tensor, lists: Tensor) -> Tensor:
        q, k, v = (p.transpose(1, 2) for p in (x @ fused.T).view(1, 96, 3, 4, 16).unbind(2))
        known = {"q": q, "k": k, "v": v, "clock": clock, "rest": rest, "share": share, "lists": lists}
        out = getattr(torch.ops.chipmunk, op)(*(known.get(name) for name in names), **keywords)
        return out.transpose(1, 2).reshape(1, 96, 64) @ last.T

    want = site(x, values["clock"], *expected)
    with torch.no_grad():
        compiled = torch.compile(site, fullgraph=True)
        got, (code,) = run_and_get_code(compiled, x, values["clock"], *given)
    torch.testing.assert_close(got, want)
    for cache, reference in zip(given, expected, strict=True):
        torch.testing.assert_close(cache, reference)
    assert f"chipmunk.{op}.default" in code
    assert "cpp_fused" not in code and "copy_(" not in code and "clone" not in code


def test_inductor_runs_an_mlp_site_in_place():
    case = MlpCase(lead=(1, 96), width=32, neurons=64, group_rows=32, columns=24, result=32)
    values = refreshed("mlp_sparse", case)
    values["x"] = case.tokens(torch.float32, seed=1)
    given, keywords = call("mlp_sparse", values)
    expected = [v.clone() if isinstance(v, Tensor) else v for v in given]

    def site(*given: Tensor) -> Tensor:
        return torch.ops.chipmunk.mlp_sparse(*given, **keywords)

    want = site(*expected)
    with torch.no_grad():
        got, (code,) = run_and_get_code(torch.compile(site, fullgraph=True), *given)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(given[9:], expected[9:])  # hidden, out, mean, lists
    assert "cpp_fused" not in code and "copy_(" not in code and "clone" not in code


def test_an_unused_result_does_not_remove_the_call():
    """The caches are an effect of the operator."""
    case = AttentionCase(rows=64, keys=64, width=16, group_rows=32, columns=24)
    values = case.values(torch.float32)
    positional, keywords = call("attention_refresh", values)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forget(*tensors):
        torch.ops.chipmunk.attention_refresh(*tensors, **keywords)
        return tensors[0] + 1

    with torch.no_grad():
        forget(*positional)
    assert values["rest"].isfinite().all() and (values["lists"] >= 0).all()


def backend(name: str, refusal: str | None, **functions: Any) -> Any:
    return SimpleNamespace(name=name, supports=lambda op, arguments: refusal, **functions)


def test_the_first_backend_that_takes_a_call_runs_it():
    def fast(*_, **__):
        return torch.zeros(())

    backends = [
        backend("empty", None),
        backend("picky", "head width 40, allowed are 64 and 128", attention_sparse=fast),
        backend("fast", None, attention_sparse=fast),
        backend("late", None, attention_sparse=fast),
    ]
    chosen, name, refused = kernels.choose("attention_sparse", {}, backends)
    assert (chosen, name) == (fast, "fast")
    assert refused == ("empty: does not implement attention_sparse", "picky: head width 40, allowed are 64 and 128")


@pytest.mark.parametrize("op", REFERENCE)
def test_the_reference_takes_what_is_left(op: str):
    chosen, name, refused = kernels.choose(op, {}, [backend("none", "wrong device", **{op: None})])
    assert (chosen, name, refused) == (REFERENCE[op], "reference", (f"none: does not implement {op}",))


def test_arguments_by_name():
    case = MLP_CASES[0]
    values = case.values(torch.float32)
    positional, keywords = call("mlp_sparse", values)
    given: dict[str, Any] = {}
    run = implementation("mlp_sparse", lambda op, arguments: given.update(arguments) or (lambda **_: torch.zeros(())))
    run(*positional, **keywords)
    assert given.keys() == values.keys()
    assert all(given[name] is values[name] for name in given)


def test_a_refresh_that_is_told_to_keep_lists_chooses_none():
    """As without `renew`, whose attribute a graph has for good."""
    case = AttentionCase(rows=64, keys=64, width=16, group_rows=16, columns=24)
    made = []
    kept_lists = {"renew": False}
    for kept in (kept_lists, *(kept_lists | {"known": torch.tensor([known])} for known in (True, False))):
        values = case.values(torch.float32) | kept
        values["lists"].copy_(torch.arange(24))
        positional, keywords = call("attention_refresh", values)
        out = torch.ops.chipmunk.attention_refresh(*positional, **keywords)
        made.append([out, *(values[name] for name in ("rest", "share", "lists"))])
    without, told, renewed = made
    assert all(map(torch.equal, without, told)) and not torch.equal(told[-1], renewed[-1])


@pytest.mark.parametrize("phase", ["dense", "refresh", "sparse"])
def test_keys_outside_of_a_span_do_not_exist(phase: str):
    case = AttentionCase(rows=63, keys=63, width=16, group_rows=16, columns=16, fixed=5, grouped=48)
    cut = case.values(torch.float32)
    cut |= {"k": cut["k"][:, :, 3:50], "v": cut["v"][:, :, 3:50], "always": cut["always"][:, 3:50]}
    valid = torch.zeros(1, 63, dtype=torch.bool)
    valid[:, 3:50] = True
    whole = case.values(torch.float32) | {"span": torch.tensor([3, 50]), "valid": valid}
    for values in (cut, whole):
        values["lists"].copy_(torch.arange(16))
        values["rest"].fill_(1)
        values["share"].fill_(0.5)
    results = []
    for values in (cut, whole):
        positional, keywords = call(f"attention_{phase}", values)
        results.append(getattr(torch.ops.chipmunk, f"attention_{phase}")(*positional, **keywords))
    assert torch.equal(*results)
    assert all(torch.equal(cut[name], whole[name]) for name in ("rest", "share", "lists"))


@pytest.mark.parametrize("op", REFERENCE)
def test_every_device_has_an_implementation(op: str):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"chipmunk::{op}", key)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"chipmunk::{op}", "CUDA")


def test_no_cuda_graph_is_recorded_around_copies_on_other_streams():
    ops = torch.ops.chipmunk
    unsafe = {op for op in REFERENCE if torch.Tag.cudagraph_unsafe in getattr(ops, op).default.tags}
    assert unsafe == {"cache_fetch", "cache_store"}
