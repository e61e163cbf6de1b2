"""The CUDA C++ kernels compile for their GPU, without one, into code that keeps its registers."""

import logging
from itertools import product

import pytest
import torch

from chipmunk_fx.kernels import hopper
from chipmunk_fx.kernels.hopper import columns, nvrtc, tuning
from chipmunk_fx.kernels.hopper.instructions import Settings

SHARED = 232_448  # bytes that one thread block may take on sm_90
EVERY = [
    tuning.columns_settings(element, width, rows)
    for element, width, rows in product(("bf16", "f16"), hopper.WIDTHS, hopper.GROUP_ROWS)
]


@pytest.mark.parametrize("settings", EVERY, ids=repr)
def test_a_kernel_fits_the_gpu(settings: Settings):
    assert settings.shared <= SHARED
    assert settings.columns % 16 == 0 and settings.columns <= 128


@pytest.mark.skipif(nvrtc.library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("settings", EVERY, ids=repr)
def test_a_kernel_compiles_without_spilling(settings: Settings, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "chipmunk_fx"):
        code = nvrtc.compiled(columns.source(settings), "sm_90a")
    assert code.startswith(b"\x7fELF") and b"attend_columns" in code
    assert "0 bytes spill stores, 0 bytes spill loads" in caplog.text
    assert "serialized" not in caplog.text  # what ptxas says when products of wgmma cannot overlap


@pytest.mark.skipif(nvrtc.library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
def test_what_does_not_compile_is_shown():
    with pytest.raises(nvrtc.CudaError, match="undeclared_name"):
        nvrtc.compiled("__global__ void f() { undeclared_name = 1; }", "sm_90a")


def test_a_call_that_is_not_on_the_gpu_is_refused_with_the_reason():
    q = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16)
    assert hopper.supports("attention_sparse", {"q": q, "group_rows": 128}) == "device cpu, allowed is cuda"
