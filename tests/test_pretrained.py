"""Inputs made from a saved configuration are those that the model takes."""

import json
from pathlib import Path

import pytest
import torch

from chipmunk_fx.pretrained import FAMILIES, PretrainedError, example_inputs, from_folder
from tests.harness.zoo import build, cast, first_tensor

MODELS = ["CogVideoX", "DiT", "Flux", "HunyuanVideo", "LTX", "Mochi", "PixArt", "QwenImage", "SD3", "Wan"]


def test_every_family_is_tried():
    assert sorted(FAMILIES) == sorted(type(build(name)[0]).__name__ for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_on_its_example_inputs(name: str):
    model, _ = cast(name, *build(name), torch.bfloat16)
    inputs = example_inputs(model, (128, 128, 5))
    with torch.no_grad():
        output = first_tensor(model(**inputs))
    assert output.isfinite().all()
    assert output.shape[-1] in (4, inputs["hidden_states"].shape[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_runs_on_uninitialised_weights(tmp_path: Path, name: str):
    build(name)[0].save_config(tmp_path)  # pyright: ignore[reportCallIssue]
    model, inputs = from_folder(tmp_path, (128, 128, 5))
    with torch.no_grad():
        assert first_tensor(model(**inputs)).dtype == torch.bfloat16


@pytest.mark.parametrize("folder", [".", "transformer"])
def test_a_saved_model_is_rebuilt_without_weights(tmp_path: Path, folder: str):
    saved, _ = build("Wan")
    saved.save_config(tmp_path / folder)  # pyright: ignore[reportCallIssue]
    model, inputs = from_folder(tmp_path, (128, 256, 9))
    shapes = {name: weight.shape for name, weight in saved.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert inputs["hidden_states"].shape == (1, 4, 3, 16, 32)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_published_flux_has_4352_tokens():
    model, _ = build("Flux")
    inputs = example_inputs(model)
    assert inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1] == 3840 + 512


def test_a_folder_without_model_is_refused(tmp_path: Path):
    with pytest.raises(PretrainedError, match="give the folder of a saved diffusers model"):
        from_folder(tmp_path)


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(PretrainedError, match=r"'UNet2DModel'; inputs are known for .*FluxTransformer2DModel"):
        from_folder(tmp_path)
