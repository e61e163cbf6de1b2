"""The laws, on models that differ in what matters: joint and self attention, spellings, MLP forms, text or none."""

import pytest
import torch

from tests.harness import laws
from tests.harness.zoo import ZOO, facts, names

EVERY_RUN = [
    "Bundled",
    "Flux",
    "SD3",
    "Wan",
    "DiT",
    "H-fused-sdpa/gelu",
    "H-softmax/gelu",
    "H-einsum/swiglu",
    "H-mha/gelu",
]
LEFT_ALONE = ["Sana"]  # linear attention and convolutions
MODELS = [
    pytest.param(name, marks=[] if name in EVERY_RUN else pytest.mark.full)
    for name in names()
    if name not in LEFT_ALONE
]
# The bundled model has nine blocks of 1040 tokens: two laws in every run, all of them with the long matrix.
QUICK_MODELS = [pytest.param("Bundled", marks=pytest.mark.full), *(p for p in MODELS if p.values[0] != "Bundled")]
# This law draws inputs for many densities: in every run for one model of each kind of attention.
FALLING = [
    pytest.param(
        p.values[0], marks=[] if p.values[0] in ("Flux", "H-fused-sdpa/gelu", "H-mha/gelu") else pytest.mark.full
    )
    for p in MODELS
]
BF16_MODELS = [p for p in QUICK_MODELS if ZOO[str(p.values[0])].bf16]


@pytest.mark.parametrize("name", MODELS)
def test_density_one_is_dense(name: str):
    laws.check_density_one_is_dense(name)


@pytest.mark.parametrize("name", BF16_MODELS)
def test_density_one_is_dense_in_bf16(name: str):
    laws.check_density_one_is_dense(name, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [pytest.param("Flux", marks=pytest.mark.full), "H-fused-sdpa/gelu"])
def test_density_one_is_dense_with_inductor(name: str):
    laws.check_density_one_is_dense(name, lowering="inductor")


@pytest.mark.parametrize("name", MODELS)
def test_standing_still(name: str):
    laws.check_standing_still(name)


@pytest.mark.parametrize(
    ("name", "site", "text"),
    [("Flux", "transformer_blocks.0.attn", ("first", 48)), ("SD3", "transformer_blocks.0.attn", ("last", 40))],
)
def test_dense_rows(name: str, site: str, text: tuple[str, int]):
    laws.check_dense_rows(name, site, (1, 24, 24), text)


@pytest.mark.parametrize("name", FALLING)
def test_error_falls(name: str):
    laws.check_error_falls(name)


@pytest.mark.parametrize("name", QUICK_MODELS)
def test_generations_apart(name: str):
    laws.check_generations_apart(name)


SKIPPABLE = [
    pytest.param(name, marks=[] if name in (*EVERY_RUN, "Sana") and name != "Bundled" else pytest.mark.full)
    for name in names()
    if facts(name)["skippable"]
]


@pytest.mark.parametrize("name", SKIPPABLE)
def test_skipped_steps(name: str):
    laws.check_skipped_steps(name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo", "H-fused-sdpa/gelu"])
def test_nothing_of_the_blocks_is_generated(name: str):
    laws.check_nothing_of_the_blocks_is_generated(name)


@pytest.mark.parametrize("name", [name for name in names() if not facts(name)["skippable"]])
def test_no_step_is_skipped(name: str):
    laws.check_no_step_is_skipped(name)


@pytest.mark.full
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str):
    laws.check_left_alone(name)
