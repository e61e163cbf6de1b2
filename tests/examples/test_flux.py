"""The main example, on the bundled model and on a small FLUX pipeline saved to disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chipmunk_fx.images import load

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--lowering", "eager", "--option", "gate=off", "--option", "attention.group_rows=16")


@pytest.fixture
def flux(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The script's main function, as a list of words; its neighbours are importable only meanwhile."""
    names = ("flux", "common", "measure", "photos")
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = import_module("flux")
    yield lambda *words: script.main([str(word) for word in words])
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline with random weights: two text encoders with tokenizers of single letters, autoencoder, transformer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    clip, clip_tokens = clip_encoder(folder)
    t5, t5_tokens = t5_encoder()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    diffusers.FluxPipeline(scheduler, vae, clip, clip_tokens, t5, t5_tokens, transformer).save_pretrained(
        folder / "all"
    )
    return folder / "all"


def clip_encoder(folder: Path) -> tuple[Any, Any]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return transformers.CLIPTextModel(config), tokens


def t5_encoder() -> tuple[Any, Any]:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    model = tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2)
    tokens = transformers.T5TokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), extra_ids=0, model_max_length=512
    )
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config), tokens


def test_the_bundled_model_from_another_folder(tmp_path: Path):
    words = ("--size", "64", "--steps", "4", "--images", "2", "--out", "made/pair.png", "--json", "figures.json")
    script = [sys.executable, str(EXAMPLES / "flux.py"), *words, *SMALL, "--option", "schedule.refresh_every=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # pictures this small are slower with more
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in (
        "refresh step, median s",
        "speed-up",
        "PSNR against dense, mean dB",
        "attention sites rewritten",
        "caches, MB",
    ):
        assert row in done.stdout
    assert "chipmunk: " in done.stderr, "a progress bar"

    assert load(tmp_path / "made" / "pair.png").shape == (3, 16 + 2 * 64 + 4, 2 * 64 + 4)
    figures = json.loads((tmp_path / "figures.json").read_text())
    phases = ["refresh", "sparse", "sparse", "refresh"]
    assert [phase for phase, _ in figures["chipmunk"]["steps"]] == 2 * phases
    assert [phase for phase, _ in figures["dense"]["steps"]] == 8 * ["dense"]
    assert all(seconds > 0 for _, seconds in figures["chipmunk"]["steps"] + figures["dense"]["steps"])
    assert figures["speed_up"] == pytest.approx(figures["dense"]["total_s"] / figures["chipmunk"]["total_s"])
    assert figures["sites"]["attention"]["found"] == 9 and figures["sites"]["attention"]["rewritten"] == 7
    assert figures["sites"]["attention"]["computed"] < 0.5 and figures["cache_bytes"] > 0
    assert len(figures["psnr_db"]) == 2 and 20 < min(figures["psnr_db"]) < 100


def test_guidance_calls_the_bundled_model_twice_a_step(flux: Callable[..., None], tmp_path: Path):
    words = ("--size", 64, "--steps", 3, "--images", 1, "--guidance", 2, "--no-dense", *SMALL)
    flux(*words, "--out", tmp_path / "a.png", "--json", tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["phases"] == {"0": ["refresh", "sparse", "sparse"], "1": ["refresh", "sparse", "sparse"]}
    assert figures["dense"] is None and len(figures["chipmunk"]["steps"]) == 3
    assert load(tmp_path / "a.png").shape == (3, 64, 64)


def test_a_whole_pipeline(
    flux: Callable[..., None], pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = {"attention": {"dense_layers": 0}, "mlp": {"enabled": False}, "schedule": {"refresh_steps": [0, 1]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ("--model", pipeline, "--prompt", "a cat", "--size", "64x96", "--steps", 4, "--guidance", 2.5, *SMALL)
    files = ("--out", tmp_path / "a.png", "--json", tmp_path / "a.json", "--config", tmp_path / "config.yaml")
    flux(*words, *files, "--dtype", "fp32")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["phases"] == {"0": ["refresh", "refresh", "sparse", "sparse"]}
    assert figures["chipmunk"]["warm_up_s"] > 0 and "compiling, with 1 / 3 steps" in capsys.readouterr().out
    assert figures["sites"]["attention"]["rewritten"] == 3 and figures["sites"]["mlp"]["rewritten"] == 0
    assert figures["psnr_db"][0] > 20
    assert load(tmp_path / "a.png").shape == (3, 16 + 64, 2 * 96 + 4)


def test_all_columns_give_the_dense_picture(flux: Callable[..., None], pipeline: Path, tmp_path: Path):
    words = ("--model", pipeline, "--size", 64, "--steps", 3, "--dtype", "fp32", "--lowering", "eager")
    flux(*words, "--option", "preset=exact", "--out", tmp_path / "a.png", "--json", tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["sites"]["mlp"]["rewritten"] == figures["sites"]["mlp"]["found"] == 4
    assert figures["psnr_db"][0] > 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "nowhere: neither a folder with model_index.json"),
        (["--model", "{pipeline}/transformer"], "a transformer alone; give the folder of its whole pipeline"),
        (["--model", "{pipeline}", "--classes", "cat"], "a pipeline takes --prompt"),
        (["--prompt", "a cat"], "this model takes --classes instead"),
        (["--classes", "dog"], "class 'dog' is unknown; choose one of astronaut, cat"),
        (["--size", "64x96"], "this model draws squares"),
        (["--size", "0"], "argument --size: invalid size value: '0'"),
        pytest.param(
            ["--device", "cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")
        ),
        (["--option", "attention.density"], "write KEY=VALUE"),
        (["--option", "attention.density=2"], "attention.density = 2 is not allowed"),
        (["--option", "attention.denisty=0.1"], "Did you mean 'attention.density'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_does_not_fit_is_told(
    flux: Callable[..., None], pipeline: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        flux(*(word.format(pipeline=pipeline) for word in words))
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
