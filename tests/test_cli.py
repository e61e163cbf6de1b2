"""The command line, called as a user calls it: arguments in, text and an exit status out."""

import json
import sys
from math import inf, log10
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chipmunk_fx import images
from chipmunk_fx.cli import main
from tests.harness.zoo import build

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 16), noise: float = 0.0) -> Path:
    """A smooth random picture, with noise that differs from file to file where asked for."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse, size=size[::-1], mode="bilinear")[0]
    pixels = (pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(99))).clamp(0, 1)
    Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    return path


def test_two_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", noise=0.05)
    assert main(["compare", str(a), str(b), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["picture"] == "a.png"
    assert row["psnr"] == pytest.approx(images.psnr(images.load(a), images.load(b)))
    assert 20 < row["psnr"] < 40
    assert 0 < row["ssim"] < 1


def test_the_table_names_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = picture(tmp_path / "a.png")
    assert main(["compare", str(a), str(a)]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["picture", "PSNR", "(dB)", "SSIM"]
    assert row.split()[:3] == ["a.png", "inf", "1.0000"]


def test_two_folders_are_paired_by_name_and_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, noise in (("dense", 0.0), ("sparse", 0.05)):
        (tmp_path / folder).mkdir()
        for seed in (1, 2):
            picture(tmp_path / folder / f"{seed}.png", seed, noise=noise)
    (tmp_path / "dense" / "notes.txt").write_text("not a picture")
    assert main(["compare", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--json"]) == 0
    first, second, mean = json.loads(capsys.readouterr().out)
    assert [row["picture"] for row in (first, second, mean)] == ["1.png", "2.png", "mean"]
    assert mean["psnr"] == pytest.approx((first["psnr"] + second["psnr"]) / 2)


def test_where_two_pictures_differ_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = picture(tmp_path / "a.png"), images.load(tmp_path / "a.png")
    b[:, 2:5, 7] = 1 - b[:, 2:5, 7].round()
    images.save(b, tmp_path / "b.png")
    assert main(["compare", str(a), str(tmp_path / "b.png"), "--diff", str(tmp_path / "d.png")]) == 0
    red, green, blue = images.load(tmp_path / "d.png")
    apart = red - torch.maximum(green, blue) > 0.2
    assert apart.nonzero().tolist() == [[2, 7], [3, 7], [4, 7]] and red[2:5, 7].max() > 0.99
    assert torch.equal(green, blue) and (red - images.load(a).mean(0) / 2).abs()[~apart].max() < 0.01


def test_folders_have_a_folder_of_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, noise in (("dense", 0.0), ("sparse", 0.05)):
        (tmp_path / folder).mkdir()
        for seed in (1, 2):
            picture(tmp_path / folder / f"{seed}.png", seed, noise=noise)
    pair = [str(tmp_path / "dense"), str(tmp_path / "sparse")]
    assert main(["compare", *pair, "--diff", str(tmp_path / "apart")]) == 0
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == ["1.png", "2.png"]
    (tmp_path / "file").write_text("")
    assert main(["compare", *pair, "--diff", str(tmp_path / "file")]) == 2
    assert "two folders need a folder" in capsys.readouterr().err
    assert main(["compare", *[f"{folder}/1.png" for folder in pair], "--diff", str(tmp_path / "d.xyz")]) == 2
    assert "d.xyz cannot be written" in capsys.readouterr().err


def test_lpips_is_a_column_where_it_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Network:
        """Stands for the package: inputs in [-1, 1], [1, 3, H, W], and a tensor of one number."""

        def __init__(self, net: str, verbose: bool) -> None:
            assert net == "alex"

        def eval(self) -> "Network":
            return self

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == b.shape == (1, 3, 16, 24) and a.min() < 0
            return (a - b).abs().mean().view(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", noise=0.05)
    assert main(["compare", str(a), str(b), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["lpips"] == pytest.approx(2 * (images.load(a) - images.load(b)).abs().mean().item(), rel=1e-4)


def test_equal_pictures_are_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = picture(tmp_path / "a.png")
    main(["compare", str(a), str(a), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["psnr"] is None
    assert row["ssim"] == 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("a.png", "small.png", "differ in size (24 x 16 and 20 x 16)"),
        ("a.png", "none.png", "none.png does not exist"),
        ("a.png", "folder", "are a picture and a folder"),
        ("folder", "other", "do not hold pictures of the same names: x.png"),
        ("other", "other", "none of them has any picture"),
        ("a.png", "text.png", "cannot be read as a picture"),
        ("deep.png", "deep.png", "more than 8 bits a channel"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], first, second, said):
    picture(tmp_path / "a.png")
    picture(tmp_path / "small.png", size=(20, 16))
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    picture(tmp_path / "folder" / "x.png")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("I;16", (24, 16)).save(tmp_path / "deep.png")
    assert main(["compare", str(tmp_path / first), str(tmp_path / second)]) == 2
    assert said in capsys.readouterr().err


def test_psnr_is_that_of_the_mean_squared_error():
    a = torch.zeros(3, 16, 16)
    assert images.psnr(a, a) == inf
    assert images.psnr(a, a + 0.1) == pytest.approx(-10 * log10(0.01), abs=1e-4)


def test_ssim_of_flat_pictures_is_their_luminance_term():
    a, b = torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.6)
    assert images.ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-6)


def test_ssim_of_one_window_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 11, 11, generator=generator, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(11) - 5.0, torch.arange(11) - 5.0, indexing="ij")
    weights = torch.exp(-(rows**2 + columns**2) / (2 * 1.5**2)).double()
    weights /= weights.sum()
    x, y = (weights * a).sum(), (weights * b).sum()
    xx, yy, xy = (weights * (a - x) ** 2).sum(), (weights * (b - y) ** 2).sum(), (weights * (a - x) * (b - y)).sum()
    want = (2 * x * y + 1e-4) * (2 * xy + 9e-4) / ((x**2 + y**2 + 1e-4) * (xx + yy + 9e-4))
    assert images.ssim(a, b) == pytest.approx(want.item(), abs=1e-6)


def test_ssim_needs_a_window():
    with pytest.raises(images.ImageError, match="at least 11 x 11 pixels, got 16 x 8"):
        images.ssim(torch.zeros(3, 8, 16), torch.zeros(3, 8, 16))


FACTORY = """
from tests.harness.zoo import build

def hand():
    return build("H-fused-sdpa/gelu")

def nothing_of_use():
    return 1, 2, 3

def sized(height, width=8):
    return hand()

number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Modules `some_models` and `folder.models` in the current folder."""
    (tmp_path / "folder").mkdir()
    for file in ("some_models.py", "folder/models.py"):
        (tmp_path / file).write_text(FACTORY)
    (tmp_path / "importing_models.py").write_text("from some_models import hand")
    (tmp_path / "json.py").write_text("raise ImportError('the library of this name is meant')")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("some_models", "folder", "importing_models"):
            del sys.modules[name]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("factory", ["some_models:hand", "folder.models:hand", "importing_models:hand"])
def test_explain_lists_the_sites(capsys: pytest.CaptureFixture[str], factory: str):
    assert main(["explain", factory, "--option", "gate=off", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    accepted = [site["kind"] for site in sites if site["accepted"]]
    assert (accepted.count("attention"), accepted.count("mlp")) == (3, 3)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["some_models"], "'some_models' is not of the form MODULE:FACTORY"),
        (["no_such_module:hand"], "no module 'no_such_module'"),
        (["some_models.part:hand"], "no module 'some_models.part'"),
        (["some_models:nothing"], "some_models has no function 'nothing'"),
        (["some_models:number"], "some_models has no function 'number'"),
        (["some_models:nothing_of_use"], "some_models:nothing_of_use returned (int, int, int); it should return"),
        (["os:getcwd"], "os:getcwd returned a str; it should return (model, keyword inputs)"),
        (["some_models:sized"], "some_models:sized is called without arguments and needs height"),
        (["some_models:hand", "--size", "64x64"], "--size goes with --model"),
        (["some_models:hand", "--option", "gate"], "--option 'gate' has no '='"),
        (["some_models:hand", "--option", "gate=["], "--option 'gate=[': '[' is not YAML"),
        (["some_models:hand", "--option", "attention.densty=0.1"], "attention.densty"),
    ],
)
def test_what_cannot_be_explained_is_said(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str):
    assert main(["explain", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_saved_model_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    build("SD3")[0].save_config(tmp_path)  # pyright: ignore[reportCallIssue]
    assert main(["explain", "--model", str(tmp_path), "--size", "128x128", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    accepted = [site["kind"] for site in sites if site["accepted"]]
    assert (accepted.count("attention"), accepted.count("mlp")) == (4, 7)


@pytest.mark.parametrize("arguments", [[], ["some:thing", "--model", "."], ["--model", ".", "--size", "12"]])
def test_explain_takes_one_source_and_a_size(arguments: list[str]):
    with pytest.raises(SystemExit) as exit:
        main(["explain", *arguments])
    assert exit.value.code == 2


@pytest.mark.parametrize("command", [[], ["explain"], ["compare"], ["bench"], ["bench", "kernels"], ["bench", "model"]])
def test_help_is_given_on_each_command(capsys: pytest.CaptureFixture[str], command: list[str]):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    assert "usage: chipmunk-fx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "--model", ".", "--size", "3"], "'3' is not HxW or HxWxF"),
        (["explain", "--model", ".", "--size", "0x64"], "'0x64' is not HxW or HxWxF"),
        (["bench", "kernels", "--density", "3"], "'3' is not a share"),
        (["bench", "kernels", "--rest", "-1"], "'-1' is not a number of seconds"),
        (["bench", "kernels", "--rest", "long"], "'long' is not a number of seconds"),
        (["bench", "kernels", "--rows", "0"], "'0' is not a whole number of at least 1"),
        (["bench", "kernels", "--device", "foo"], "'foo' is no device here"),
        (["bench", "model", "flux", "--device", "meta"], "'meta' is no device here"),
        (["bench", "model", "flux", "--steps", "-1"], "'-1' is not a whole number of at least 1"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_a_factory_chooses_its_own_size(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "model", "some_models:hand", "--size", "64x64"]) == 2
    assert "--size and --blocks go with a named model" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_a_model_of_ones_own_is_measured(capsys: pytest.CaptureFixture[str]):
    settings = ["gate=off", "lowering=eager", "attention.group_rows=16", "mlp.group_rows=16"]
    options = [word for setting in settings for word in ("--option", setting)]
    words = ["bench", "model", "some_models:hand", "--device", "cpu", "--rounds", "1", "--json", *options]
    assert main(words) == 0
    ways = {way["way"]: way for way in json.loads(capsys.readouterr().out)["ways"]}
    assert {"dense", "sparse"} <= ways.keys() and ways["sparse"]["sites"]["attention"] == "1 of 3"


@pytest.mark.usefixtures("models")
def test_a_model_that_is_not_known_is_not_measured(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "model", "fluxx"]) == 2
    assert "no model 'fluxx'; there are flux" in capsys.readouterr().err
