"""What every sparse model must obey, checked through the public names alone.

Each law is a function of the name of a model in the zoo. Laws 2 to 5 also assert that sparsity was real: fewer than
half of the columns and neurons were computed on sparse steps.
"""

import re
from copy import deepcopy
from statistics import mean, median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import chipmunk_fx
from tests.harness.tolerance import assert_near, assert_within_twice, relative
from tests.harness.zoo import Inputs, cast, enlarged, facts, first_tensor, step_inputs

_IN_A_BLOCK = re.compile(r"blocks\.\d+\.")
_PRODUCT = re.compile(r"(?:addmm|\bmm|bmm|_linear_pointwise|_mkl_linear)\(")
_ATTENTION = re.compile(r"scaled_dot_product|chipmunk\.(?:attention|mlp)")

STEPS = 5
REFRESH_EVERY = 3
PHASES = ["refresh", "sparse", "sparse", "refresh", "sparse"]
SCHEDULE_LENGTH = 50  # timesteps fall as in a run of so many steps, of which the first STEPS are made


def compiled(model: nn.Module, lowering: str, density: float, whole: bool = False, **options: Any) -> Any:
    """The model under our backend with lists shared by 16 rows, every layer sparse and nothing gated; `whole`: as one graph.

    Options with dots are written with two underscores. Dynamo's caches are cleared first: it gives up on a class
    after eight sets of options.
    """
    torch._dynamo.reset()
    settings = {
        "attention.density": density,
        "mlp.density": density,
        "attention.group_rows": 16,
        "mlp.group_rows": 16,
        "attention.dense_layers": 0,
        "mlp.dense_layers": 0,
        "schedule.steps": STEPS,
        "schedule.branches": 1,
        "schedule.refresh_every": REFRESH_EVERY,
        "lowering": lowering,
        "gate": "off",
    }
    settings |= {key.replace("__", "."): value for key, value in options.items()}
    return torch.compile(model, backend="chipmunk", fullgraph=whole, options=settings)


def moving(name: str, inputs: Inputs, drift: float, seed: int = 0) -> list[Inputs]:
    """The inputs of one generation's steps."""
    return [step_inputs(name, inputs, i, SCHEDULE_LENGTH, drift, seed) for i in range(STEPS)]


@torch.no_grad()
def outputs(model: Any, steps: list[Inputs]) -> list[Tensor]:
    return [first_tensor(model(**inputs)) for inputs in steps]


# What no pattern takes yet, by model; a pattern that comes to take it has to be struck off here.
LEFT_DENSE: dict[str, list[str]] = {}


def assert_scheduled(model: Any, name: str) -> None:
    """Every rewritten site followed the schedule, and there is one of each kind that patterns take in this model."""
    summary = chipmunk_fx.summary(model)
    assert summary.phases == {0: PHASES}
    assert not summary.fallbacks
    rewritten = [site for site in summary.sites if site.status == "rewritten"]
    assert all(site.phases == {0: PHASES} for site in rewritten)
    missing = [kind for kind in ("attention", "mlp") if facts(name)[kind] and kind not in {s.kind for s in rewritten}]
    assert missing == LEFT_DENSE.get(name, []), f"no {' and no '.join(missing)} of {name} is rewritten"


def assert_sparse(model: Any, name: str, kinds: tuple[str, ...] = ("attention", "mlp")) -> None:
    """The typical site of each kind computed fewer than half of its columns on sparse steps.

    Not every site: some towers are a dozen tokens long, less than one tile of columns.
    """
    for kind in (kind for kind in kinds if kind not in LEFT_DENSE.get(name, [])):
        sites = [site for site in chipmunk_fx.summary(model).sites if site.kind == kind]
        shares = [site.density for site in sites if "sparse" in site.phases[0]]
        assert shares and median_low(shares) < 0.5, f"{kind}: computed shares of columns {shares}"


def check_density_one_is_dense(name: str, lowering: str = "eager", dtype: torch.dtype = torch.float32) -> None:
    """Law 1: with all columns computed, every phase equals the dense model while inputs move."""
    model, inputs = cast(name, *enlarged(name), dtype)
    steps = moving(name, inputs, drift=0.3)
    dense = outputs(model, steps)
    everything = {"attention__random_density": 0.0, "mlp__random_density": 0.0}
    sparse_model = compiled(model, lowering, 1.0, facts(name)["one_graph"], **everything)
    sparse = outputs(sparse_model, steps)
    assert_scheduled(sparse_model, name)
    if dtype == torch.float32:
        return assert_near(sparse, dense)
    exact_model = deepcopy(model).float()  # the rounded weights and inputs, computed exactly
    exact = outputs(exact_model, [cast(name, exact_model, step, torch.float32)[1] for step in steps])
    return assert_within_twice(sparse, dense, exact)


def check_standing_still(
    name: str, lowering: str = "eager", dtype: torch.dtype = torch.float32, density: float = 0.1
) -> None:
    """Law 2: where inputs repeat those of the refresh, a sparse step equals dense at any density."""
    model, inputs = cast(name, *enlarged(name), dtype)
    steps = [step_inputs(name, inputs, 0, SCHEDULE_LENGTH)] * STEPS
    dense = outputs(model, steps)
    sparse_model = compiled(model, lowering, density, facts(name)["one_graph"])
    sparse = outputs(sparse_model, steps)
    assert_scheduled(sparse_model, name)
    assert_sparse(sparse_model, name)
    assert_near(sparse, dense)


def check_dense_rows(
    name: str, site: str, grid: tuple[int, int, int], text: tuple[str, int], lowering: str = "eager"
) -> None:
    """Law 3: rows kept dense equal dense attention on the same q, k, v, while the others do not.

    `site` is the path of a joint attention module that returns (image rows, text rows). It is compiled alone, on the
    inputs that it gets in the model; its projections work row by row, so its text output shows the text rows.
    """
    model, inputs = enlarged(name)
    attention = model.get_submodule(site)
    steps = _inputs_of(attention, model, moving(name, inputs, drift=0.3))
    sparse_attention = compiled(
        attention, lowering, 0.1, attention__text_rows="dense", tokens__grid=grid, tokens__text=text
    )
    with torch.no_grad():
        dense = [attention(*args, **kwargs) for args, kwargs in steps]
        sparse = [sparse_attention(*args, **kwargs) for args, kwargs in steps]
    assert_sparse(sparse_attention, name, kinds=("attention",))
    assert_near([rows for _, rows in sparse], [rows for _, rows in dense])
    moved = [relative(ours[0], theirs[0]) for ours, theirs in zip(sparse, dense, strict=True)]
    assert all((error > 1e-4) == (phase == "sparse") for error, phase in zip(moved, PHASES, strict=True)), moved


def check_error_falls(name: str, lowering: str = "eager", seeds: int = 8) -> None:
    """Law 4: the mean error over seeds falls as the density rises, with 5 % slack."""
    model, inputs = enlarged(name)
    generations = [moving(name, inputs, 0.1, seed) for seed in range(seeds)]
    dense = [outputs(model, steps) for steps in generations]
    errors = []
    for density in (0.05, 0.2, 0.5):
        sparse_model = compiled(model, lowering, density, facts(name)["one_graph"])
        sparse = []
        for steps in generations:
            chipmunk_fx.reset(sparse_model)
            sparse.append(outputs(sparse_model, steps))
        if density < 0.5:
            assert_sparse(sparse_model, name)
        errors.append(mean(_sparse_errors(sparse, dense)))
    assert errors[0] > 0
    assert errors[1] <= 1.05 * errors[0] and errors[2] <= 1.05 * errors[1], f"errors by density {errors}"
    assert errors[2] < errors[0], f"errors by density {errors}"


def check_generations_apart(name: str, lowering: str = "eager") -> None:
    """Law 5: two generations interleaved on one compiled model give bit for bit what each gives alone."""
    model, inputs = enlarged(name)
    first, second = moving(name, inputs, 0.3, seed=1), moving(name, inputs, 0.3, seed=2)
    sparse_model = compiled(model, lowering, 0.1, facts(name)["one_graph"])
    alone = []
    for key, steps in (("first alone", first), ("second alone", second)):
        with chipmunk_fx.generation(sparse_model, key=key):
            alone.append(outputs(sparse_model, steps))
    mixed: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in zip(first, second, strict=True):
        for key, step, kept in zip(("first mixed", "second mixed"), pair, mixed, strict=True):
            with chipmunk_fx.generation(sparse_model, key=key):
                kept += outputs(sparse_model, [step])
    assert_scheduled(sparse_model, name)
    assert_sparse(sparse_model, name)
    for kept, expected in zip(mixed, alone, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, expected, strict=True))
    assert not torch.equal(mixed[0][-1], mixed[1][-1])


def check_skipped_steps(name: str, lowering: str = "eager") -> None:
    """Where inputs repeat, a step that skips the blocks equals dense, and runs no attention and no MLP of the blocks."""
    model, inputs = enlarged(name)
    steps = [step_inputs(name, inputs, 0, SCHEDULE_LENGTH)] * 3
    off = {"attention__enabled": False, "mlp__enabled": False, "schedule__skip_steps": [1, 2]}
    skipping = compiled(model, lowering, 1.0, facts(name)["one_graph"], **off)
    ours, dense = outputs(skipping, steps), outputs(model, steps)
    summary = chipmunk_fx.summary(skipping)
    assert summary.phases == {0: ["dense", "skip", "skip"]}
    assert summary.flops_ratio < 0.75, "what is around the blocks is small"
    assert_near(ours, dense)
    with torch.no_grad():
        moved = first_tensor(model(**step_inputs(name, inputs, 10, SCHEDULE_LENGTH, 0.3)))
    assert relative(moved, dense[0]) > 1e-3, "the model does not depend on what moves"


def check_nothing_of_the_blocks_is_generated(name: str) -> None:
    """Inductor's code for a skipped step has the products that stand outside of the blocks, and no attention at all."""
    model, inputs = enlarged(name)
    steps = [step_inputs(name, inputs, 0, SCHEDULE_LENGTH)] * 2
    off = {"attention__enabled": False, "mlp__enabled": False, "schedule__skip_steps": [1]}
    skipping = compiled(model, "inductor", 1.0, facts(name)["one_graph"], **off)
    with fresh_cache():
        _, (computed, skipped) = run_and_get_code(lambda: outputs(skipping, steps))
    assert chipmunk_fx.summary(skipping).phases == {0: ["dense", "skip"]}
    calls = _linear_calls(model, inputs)
    inside = [path for path in calls if _IN_A_BLOCK.search(path)]
    assert len(inside) > 3 and len(_PRODUCT.findall(computed)) >= len(calls)
    assert 0 < len(_PRODUCT.findall(skipped)) <= len(calls) - len(inside)
    assert _ATTENTION.search(computed) and not _ATTENTION.search(skipped)
    assert "region_store" in computed and "region_add" in skipped


def check_no_step_is_skipped(name: str) -> None:
    """A model whose blocks cannot be told from what is around them is left whole, and `explain` says why."""
    model, inputs = enlarged(name)
    report = chipmunk_fx.explain(model, **inputs, config={"schedule.skip_steps": [1]})
    reasons = [note for note in report.notes if note.startswith("no step can be skipped: ")]
    assert reasons and not any("blocks that can be skipped" in note for note in report.notes)
    assert all(len(note) > len("no step can be skipped: ") + 20 for note in reasons)
    steps = moving(name, inputs, drift=0.3)
    ours = compiled(
        model, "eager", 1.0, attention__random_density=0.0, mlp__random_density=0.0, schedule__skip_steps=[1]
    )
    assert_near(outputs(ours, steps), outputs(model, steps))


def _linear_calls(model: nn.Module, inputs: Inputs) -> list[str]:
    """The path of the module of every call of a linear."""
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    outputs(model, [inputs])
    for hook in hooks:
        hook.remove()
    return calls


def _inputs_of(module: nn.Module, model: nn.Module, steps: list[Inputs]) -> list[tuple[tuple, dict]]:
    """The (args, kwargs) that a part of the model is called with, one for each step."""
    seen: list[tuple[tuple, dict]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    outputs(model, steps)
    hook.remove()
    return seen


def _sparse_errors(sparse: list[list[Tensor]], dense: list[list[Tensor]]) -> list[float]:
    return [
        relative(ours[step], theirs[step])
        for ours, theirs in zip(sparse, dense, strict=True)
        for step, phase in enumerate(PHASES)
        if phase == "sparse"
    ]


def check_left_alone(name: str) -> None:
    """A model in which nothing can be rewritten gives what it gives without us."""
    model, inputs = enlarged(name)
    steps = moving(name, inputs, drift=0.3)
    assert_near(outputs(compiled(model, "eager", 0.1), steps), outputs(model, steps))
