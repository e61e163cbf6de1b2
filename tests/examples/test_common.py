"""The examples' helpers."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from chipmunk_fx.images import load

pytest.importorskip("PIL")
PATH = Path(__file__).parents[2] / "examples" / "common.py"


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = spec_from_file_location("examples_common", PATH)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_stand_side_by_side(common: ModuleType, tmp_path: Path):
    dense = [torch.full((3, 20, 30), 0.2), torch.full((3, 20, 30), 0.4)]
    sparse = [torch.full((3, 20, 30), 0.6), torch.full((3, 20, 30), 2.0)]  # 2.0 is cut off to white
    common.side_by_side(dense, sparse, ("dense", "sparse"), tmp_path / "pair.png")
    sheet = load(tmp_path / "pair.png")
    assert sheet.shape == (3, 16 + 2 * 20 + 4, 2 * 30 + 4)
    corners = [sheet[:, y, x] for y in (16, -1) for x in (0, -1)]
    for corner, value in zip(corners, (0.2, 0.6, 0.4, 1.0), strict=True):
        assert torch.allclose(corner, torch.full((3,), value), atol=1e-6)
    assert sheet[:, :16].min() < 0.5, "the labels are written above"


def test_unpaired_pictures_are_refused(common: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="2 dense and 1 sparse images"):
        common.side_by_side([torch.zeros(3, 8, 8)] * 2, [torch.zeros(3, 8, 8)], ("a", "b"), tmp_path / "x.png")


def test_a_table_is_printed(common: ModuleType, capsys: pytest.CaptureFixture[str]):
    common.print_table(
        [{"run": "dense", "seconds": 2.0, "PSNR": None}, {"run": "sparse", "seconds": 1.256, "PSNR": 33.0}]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (lines[0], lines[-1])] == [["run", "seconds", "PSNR"], ["sparse", "1.26", "33.00"]]


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_the_default_where_it_is_multiplied(
    common: ModuleType, supported: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert common.default_dtype("cpu") == ("bf16" if supported else "fp32")
    assert common.default_dtype("cuda:1") == "bf16"
