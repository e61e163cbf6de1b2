"""What an installation brings: every folder, the backend's name, the command and the public names."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

import chipmunk_fx
import chipmunk_fx.kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_are_the_folders_on_disk():
    mapping = {package: ROOT / folder for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    folders = {
        ".".join([package, *path.parent.relative_to(root).parts])
        for package, root in mapping.items()
        for path in root.rglob("*.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_packages_have_an_init_file():
    folders = {path.parent for root in ("chipmunk_fx", "kernels", "patterns") for path in (ROOT / root).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders), folders


def test_the_backend_is_known_by_name():
    (entry,) = entry_points(group="torch_dynamo_backends", name="chipmunk")
    assert callable(entry.load())
    assert "chipmunk" in torch._dynamo.list_backends(exclude_tags=())


def test_kernels_found_by_another_name_register_nothing():
    """As diffusers finds them, which looks for a distribution of that name, where the repository is on the path."""
    spec = spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    assert spec and spec.loader and chipmunk_fx.kernels.LIBRARY is not None
    spec.loader.exec_module(twin := module_from_spec(spec))
    assert twin.LIBRARY is None and twin.BACKENDS == chipmunk_fx.kernels.BACKENDS


def test_the_command_resolves():
    (entry,) = entry_points(group="console_scripts", name="chipmunk-fx")
    assert callable(entry.load())


def test_public_names_resolve():
    assert all(getattr(chipmunk_fx, name) for name in chipmunk_fx.__all__)
    assert set(chipmunk_fx.__all__) <= set(dir(chipmunk_fx))


def test_the_version_is_the_installed_one():
    assert chipmunk_fx.__version__ == version("chipmunk-fx")


def test_kernels_are_tested_in_one_process_without_a_gpu():
    """Processes of pytest-xdist inherit the choice of Triton's interpreter; one alone has to make it in time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    words = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_selection.py", "-k", "test_of_changes"]
    done = subprocess.run(
        words, cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
