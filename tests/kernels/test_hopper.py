"""The CUDA C++ kernels compile for their GPU, without one, into code that keeps its registers."""

import logging
import re
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from chipmunk_fx.kernels import hopper
from chipmunk_fx.kernels.hopper import columns, masses, mlp, nvrtc, packing, selection, tuning, watching
from chipmunk_fx.kernels.hopper.instructions import ACTIVATIONS
from chipmunk_fx.kernels.hopper.tuning import RUN, ProductSettings, SelectSettings, Settings
from chipmunk_fx.ops.activations import ACTIVATIONS as KNOWN
from chipmunk_fx.ops.cases import LONG_ATTENTION_CASES, LONG_MLP_CASES

needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
EVERY = [
    replace(tuning.columns_settings(element, width, rows), **{form: True for form in forms})
    for element, width, rows in product(("bf16", "f16"), hopper.WIDTHS, hopper.GROUP_ROWS)
    for forms in ((), ("others",), ("merging",))
]

BEGIN = {2: 168, 3: 128}  # registers a thread of a block, by its multiplying warpgroups: BEGIN of primitives.cuh
FIRST = [
    *(ProductSettings("bf16", 3, columns, 2, "gelu_tanh") for columns in (96, 176, 192)),
    *(ProductSettings("bf16", c, n, 1, "gelu_tanh") for c, n in ((3, 192), (2, 256))),
    ProductSettings("bf16", 2, 256, 2, "gelu_tanh"),
    *(ProductSettings("f16", 3, 192, 2, name) for name in ("gelu", "relu2", "tanh")),
    *(
        ProductSettings(e, c, n, 2, "silu", gated=True)
        for e, c, n in (("bf16", 3, 192), ("f16", 2, 256), ("bf16", 2, 112))
    ),
    ProductSettings("bf16", 3, 176, 2, "gelu_tanh", fp8=True),
    ProductSettings("bf16", 2, 256, 2, "silu", gated=True, fp8=True),
]
SECOND_FP8 = [ProductSettings("bf16", 3, 192, cluster, fp8=True) for cluster in (1, 2)]
SECOND_FP8.append(ProductSettings("bf16", 2, 128, 2, fp8=True))
SECOND = [
    *(ProductSettings("bf16", 3, columns, 2) for columns in (64, 128, 192)),
    *(ProductSettings("f16", 2, columns, cluster) for columns, cluster in ((64, 1), (128, 2), (192, 1), (256, 2))),
]
LONG = [
    *(ProductSettings("bf16", 3, columns, 2, "gelu_tanh") for columns in (112, 128, 144, 160)),
    *(ProductSettings("bf16", 2, columns, 2, "gelu_tanh") for columns in (96, 176, 208, 224, 240)),
    *(ProductSettings("bf16", 3, columns, 1, "gelu_tanh", fp8=fp8) for columns in (96, 160) for fp8 in (False, True)),
    *(ProductSettings("bf16", 3, 192, 2, name) for name in ACTIVATIONS),
    *(ProductSettings("bf16", 3, columns, 2, "gelu", fp8=True) for columns in (96, 112, 192)),
]
PRODUCTS = [*(pytest.param(settings, "first.cu", marks=pytest.mark.full) for settings in LONG),
            *((settings, "first.cu") for settings in FIRST), *((settings, "second.cu") for settings in SECOND),
            *((settings, "second_fp8.cu") for settings in SECOND_FP8)]  # fmt: skip


@pytest.mark.parametrize("settings", EVERY, ids=repr)
def test_a_kernel_fits_the_gpu(settings: Settings):
    assert settings.shared <= tuning.SHARED
    assert settings.columns % 16 == 0 and settings.columns <= 128


@needs_nvrtc
@pytest.mark.parametrize("settings", EVERY, ids=repr)
def test_a_kernel_compiles_without_spilling(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "chipmunk_fx"):
        code = nvrtc.compiled(columns.source(settings), "sm_90a")
    assert_in_registers(code, "attend_columns", tmp_path, BEGIN[settings.consumers])
    assert "serialized" not in caplog.text  # what ptxas says when products of wgmma cannot overlap


@needs_nvrtc
def test_selection_compiles_without_spilling(tmp_path: Path):
    code = nvrtc.compiled(selection.source(SelectSettings(), "select.cu"), "sm_90a")
    assert_in_registers(code, "select_keys", tmp_path)


@needs_nvrtc
def test_the_watch_compiles_without_spilling(tmp_path: Path):
    code = nvrtc.compiled(watching.source(watching.SETTINGS), "sm_90a")
    assert_in_registers(code, "watch", tmp_path)


@needs_nvrtc
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("width", [512, 1536, 3072, 5120, 13824, 16384])
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_packing_compiles_without_spilling(element: str, width: int, fp8: bool, tmp_path: Path):
    if fp8 and element == "f16":
        pytest.skip("fp8 takes bf16 alone")
    settings = tuning.pack_settings(element, width, 192, fp8)
    assert settings.threads * settings.passes * 8 >= width and settings.threads % 32 == 0
    assert settings.block % settings.rows == 0
    assert_in_registers(nvrtc.compiled(packing.source(settings), "sm_90a"), "pack_rows", tmp_path)


@needs_nvrtc
@pytest.mark.parametrize("neurons", [4096, 8192, 16384])
def test_selection_of_neurons_compiles_without_spilling(neurons: int, tmp_path: Path):
    settings = tuning.neuron_settings(neurons)
    assert settings is not None and settings.cluster * settings.threads * RUN == neurons
    code = nvrtc.compiled(selection.source(settings, "neurons.cu"), "sm_90a")
    assert_in_registers(code, "select_neurons", tmp_path)


@needs_nvrtc
@pytest.mark.parametrize(
    "sizes",
    [("bf16", 128, 48), ("f16", 128, 32), ("bf16", 128, 24), ("bf16", 128, 16), ("bf16", 128, 128), ("f16", 64, 64)],
    ids=repr,
)
def test_masses_compile_without_spilling(sizes: tuple[str, int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    settings = tuning.mass_settings(*sizes)
    assert settings is not None
    with caplog.at_level(logging.DEBUG, "chipmunk_fx"):
        code = nvrtc.compiled(masses.source(settings), "sm_90a")
    assert_in_registers(code, "column_masses", tmp_path, BEGIN[settings.consumers])
    assert "serialized" not in caplog.text


@needs_nvrtc
@pytest.mark.parametrize(("settings", "file"), PRODUCTS, ids=repr)
def test_a_product_compiles_without_spilling(
    settings: ProductSettings, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert settings.buffers >= 3 and settings.shared <= tuning.SHARED
    with caplog.at_level(logging.DEBUG, "chipmunk_fx"):
        code = nvrtc.compiled(mlp.source(settings, file), "sm_90a")
    kernel = "exchange_listed" if file == "first.cu" else "add_listed"
    assert_in_registers(code, kernel, tmp_path, BEGIN[settings.consumers])
    assert "serialized" not in caplog.text


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "copying", "more"),
    [
        (columns.source(tuning.columns_settings("bf16", 128, 128)), "2 ? 40 :", "2 ? 48 :"),
        (mlp.source(ProductSettings("bf16", 2, 256, 2), "second.cu"), "2 ? 88 :", "2 ? 96 :"),
    ],
    ids=["attention", "product"],
)
def test_registers_that_a_block_has_not_are_not_asked_for(source: str, copying: str, more: str):
    """Its warpgroups would wait for them for ever."""
    assert source.count(copying) == 1
    with pytest.raises(nvrtc.CudaError, match="more registers than a block begins with"):
        nvrtc.compiled(source.replace(copying, more), "sm_90a")


def assert_in_registers(code: bytes, kernel: str, folder: Path, begin: int | None = None):
    """The kernel's machine code has no stack and no local memory, so nothing is spilled, and, where they hand registers to
    each other, threads `begin` with as many as that is reckoned from. Triton brings the tool that tells."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = re.search(rf"Function {kernel}:\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+) ", told)
    assert used and used.groups()[1:] == ("0", "0"), told
    assert begin is None or int(used[1]) == begin, told


def test_a_kernel_is_compiled_once_and_loaded_once_a_device(monkeypatch: pytest.MonkeyPatch):
    made, loaded = [], []
    monkeypatch.setattr(nvrtc, "compiled", lambda text, architecture: made.append(text) or b"code")
    monkeypatch.setattr(nvrtc, "load", lambda code, name, *sizes: loaded.append((code, name, *sizes)) or object())
    settings = EVERY[0]

    def source(of: Settings, *more: str) -> str:
        return f"{of.width} {more}"

    first = nvrtc.kernel("f", source, 0, settings)
    assert nvrtc.kernel("f", source, 0, settings) is first
    assert nvrtc.kernel("f", source, 1, settings) is not first
    nvrtc.kernel("g", source, 0, settings, "g.cu", cluster=2)
    assert made == [f"{settings.width} ()", f"{settings.width} ('g.cu',)"]
    sizes = settings.threads, settings.shared
    assert loaded == [(b"code", "f", *sizes, 1, 1)] * 2 + [(b"code", "g", *sizes, 2, 1)]


def test_every_activation_has_a_formula():
    assert set(ACTIVATIONS) == set(KNOWN)


@pytest.mark.parametrize("group_rows", [128, 192, 256, 384])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "listed", "width"), [(4352, 3712, 3072), (512, 40, 320), (100_000, 1024, 64)])
def test_tiles_of_products_are_allowed_and_cover_the_lists(
    group_rows: int, gated: bool, rows: int, listed: int, width: int
):
    groups = -(-rows // group_rows)
    first = tuning.first_settings("bf16", group_rows, groups, listed, "gelu", gated, False)
    second = tuning.second_settings("bf16", group_rows, groups, width, False)
    assert group_rows % first.rows == 0 and first.rows == second.rows
    assert first.neurons * first.cluster % 32 == 0
    assert first.columns % 16 == 0 and first.columns <= (192 if first.consumers == 3 else 256)
    assert width % (second.columns * second.cluster) == 0 and second.columns % 64 == 0
    blocks = groups * group_rows // first.rows
    held = first.clusters(groups * group_rows, listed) * first.cluster * first.neurons
    assert held >= blocks * -(-listed // first.depth) * first.depth  # whole stages of the second product
    assert second.clusters(groups * group_rows, width) * second.cluster * second.columns == blocks * width


@pytest.mark.parametrize("fp8", [False, True])
def test_a_tile_has_more_stages_than_are_under_way(fp8: bool):
    """Else the tables of the next tile may be announced before all have seen this one's: they would wait for ever."""
    for group_rows, listed in product(hopper.GROUP_ROWS, (16, 500)):
        settings = tuning.first_settings("bf16", group_rows, 4, listed, "gelu", False, fp8)
        assert settings.buffers < hopper.LEAST_WIDTH * (1 if fp8 else 2) // tuning.SPAN


@pytest.mark.parametrize(
    ("rows", "listed", "gated", "tile"),
    [
        (4352, 3712, False, (176, 2)),  # 192 wide tiles would take 4 rounds of 132 for what fills 3.5
        (4352, 1984, False, (192, 1)),  # 253 of them: 2 rounds, where 69 pairs are one more
        (3840, 3712, True, (192, 1)),
    ],
)
def test_the_last_round_of_tiles_is_filled_well(rows: int, listed: int, gated: bool, tile: tuple[int, int]):
    settings = tuning.first_settings("bf16", 192, -(-rows // 192), listed, "gelu", gated, False)
    assert (settings.columns, settings.cluster) == tile


@pytest.mark.parametrize(
    ("tiles", "consumers", "alone"),
    [
        (552, 3, 24),
        (1, 3, 1),
        (44, 3, 44),
        (45, 3, 0),
        (66, 2, 66),
        (67, 2, 0),
        (132, 3, 0),
        (15_760, 2, 52),
        (15_760, 3, 0),
    ],
)
def test_tiles_too_few_for_a_round_go_to_single_consumers(tiles: int, consumers: int, alone: int):
    """FLUX: 24 heads of 23 groups are 4 rounds of 132 and 24 more."""
    whole = tuning.whole_tiles(tiles, consumers, 132)
    assert tiles - whole == alone
    assert alone == 0 or whole % 132 == 0  # a block has one such task, its last: rings of queries stay in step


@pytest.mark.parametrize("units", [114, 132])
@pytest.mark.parametrize(("fp8", "group_rows"), [(False, 128), (False, 192), (True, 192)])
def test_conformance_has_cases_of_several_tiles_a_block(fp8: bool, group_rows: int, units: int):
    """What is left of a tile is done beside the next one's products, else only behind the last."""
    rounds = {"first": 0.0, "second": 0.0}
    for case in LONG_MLP_CASES:
        if case.fp8 != fp8 or case.group_rows != group_rows or case.width < hopper.LEAST_WIDTH:
            continue
        groups = case.batch * -(-case.rows // group_rows)
        first = tuning.first_settings("bf16", group_rows, groups, case.columns, "gelu", case.gated, fp8, units)
        second = tuning.second_settings("bf16", group_rows, groups, case.result, fp8, units)
        for name, settings, wide in (("first", first, case.columns), ("second", second, case.result)):
            clusters = settings.clusters(groups * group_rows, wide)
            rounds[name] = max(rounds[name], clusters / (units // settings.cluster))
    assert min(rounds.values()) > 1


@pytest.mark.parametrize("units", [114, 132])
@pytest.mark.parametrize("group_rows", [128, 192])
def test_conformance_has_tasks_of_single_consumers_behind_whole_tiles(group_rows: int, units: int):
    cases = [case for case in LONG_ATTENTION_CASES if case.group_rows == group_rows and case.width == 128]
    tiles = [case.batch * case.heads * -(-(case.grouped or case.rows) // group_rows) for case in cases]
    assert any(0 < tuning.whole_tiles(n, group_rows // 64, units) < n for n in tiles)


@needs_nvrtc
def test_what_does_not_compile_is_shown():
    with pytest.raises(nvrtc.CudaError, match="undeclared_name"):
        nvrtc.compiled("__global__ void f() { undeclared_name = 1; }", "sm_90a")


def test_a_call_that_is_not_on_the_gpu_is_refused_with_the_reason():
    q = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16)
    assert hopper.supports("attention_sparse", {"q": q, "group_rows": 128}) == "device cpu, allowed is cuda"
    assert hopper.supports("mlp_sparse", {"x": q, "group_rows": 128}) == "device cpu, allowed is cuda"
