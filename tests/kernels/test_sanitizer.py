"""compute-sanitizer sees no fault in our kernels on small shapes."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from chipmunk_fx.kernels import hopper
from tests.kernels.cards import HOPPER
from tests.kernels.test_compile import HOPPER as BESIDE
from tests.kernels.test_compile import KERNELS

SCRIPT = Path(__file__).with_name("small_shapes.py")
SANITIZER = shutil.which("compute-sanitizer")
CUDA = {
    name
    for file in Path(hopper.__file__).parent.glob("*.cu")
    for name in re.findall(r"__global__ void[^;{]*?(\w+)\(const __grid", file.read_text())
}
SOUND = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}
OPTIONS = {"memcheck": [], "racecheck": ["--every-lane"]}


def small_shapes(*before: str, options: Sequence[str] = (), **environment: str) -> str:
    """What the script prints, run behind the words of another program."""
    words = [*before, sys.executable, "-P", str(SCRIPT), *options]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def names(printed: str) -> set[str]:
    return {line.split()[0] for line in printed.splitlines() if line and not line.startswith("=")}


def test_every_file_has_a_kernel():
    assert len(CUDA) == len(list(Path(hopper.__file__).parent.glob("*.cu"))) - 1  # two have second products


@pytest.mark.full
def test_small_shapes_in_the_interpreter():
    assert names(small_shapes(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")) == KERNELS


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER or SANITIZER is None, reason="needs a Hopper GPU and compute-sanitizer")
@pytest.mark.parametrize("tool", SOUND)
def test_kernels_are_sound(tool: str):
    ours = KERNELS | BESIDE["sm_90"] | CUDA
    filters = [word for name in sorted(ours) for word in ("--kernel-name", f"kne={name}")]
    words = str(SANITIZER), "--tool", tool, "--error-exitcode", "9", *filters
    # an allocation for each tensor
    printed = small_shapes(*words, options=OPTIONS[tool], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    print(printed)
    assert names(printed) == ours
    assert SOUND[tool] in printed
