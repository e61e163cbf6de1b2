"""Every Triton kernel compiles for every target, without a GPU, within the shared memory that is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for.py")
KERNELS = {
    "_attend_columns",
    "_column_masses",
    "_select",
    "_group_means",
    "_store_activations",
    "_store_transposed",
    "_find_changes",
    "_exchange_listed",
    "_add_listed",
    "_pack",
    "_unpack",
    "_watch",
    "_rotary",
    "_first_product",
}
# before the products of kernels/hopper
HOPPER = {"sm_90": {"_find_largest", "_store_weight", "_store_scales"}}
USUAL = ["sm_90", "gfx942"]
ALL = [*USUAL, "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"]


def compiled(target: str, *options: str) -> set[str]:
    """Names of the kernels that were compiled, in a process that runs no interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith(target)}


@pytest.mark.parametrize("target", USUAL)
def test_kernels_compile(target: str):
    assert compiled(target) == KERNELS | HOPPER.get(target, set())


@pytest.mark.full
@pytest.mark.parametrize("target", ALL)
def test_kernels_compile_for_all_dtypes_and_options(target: str):
    assert compiled(target, "full") == KERNELS | HOPPER.get(target, set())
