"""Imports point downwards: a layer uses those below it, never one above or beside it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # bottom up; names on one line do not import each other
    ["errors"],
    ["log"],
    ["arguments", "schedule"],
    ["config_rules", "config_yaml"],
    ["presets"],
    ["config"],
    ["ops"],
    ["state"],
    ["graph"],
    ["kernels", "patterns"],
    ["runtime"],
    ["backend"],
    ["images", "pretrained", "bench", "bench_dense"],
    ["bench_subjects"],
    ["bench_measure"],
    ["bench_model"],
    ["cli"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FOLDERS = {"chipmunk_fx": ROOT / "chipmunk_fx", "kernels": ROOT / "kernels", "patterns": ROOT / "patterns"}


def layer_of(path: Path) -> str:
    """chipmunk_fx/graph/plan.py -> graph, chipmunk_fx/cli.py -> cli, kernels/triton/tuning.py -> kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "chipmunk_fx" else parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it from chipmunk_fx on"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(path: Path) -> Iterator[str]:
    """What a file imports that it may not."""
    own = layer_of(path)
    for line, name in imported(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        top, _, rest = name.partition(".")
        if top in ("kernels", "patterns"):
            yield f"{where}: {name}: import it as chipmunk_fx.{name}, or its classes exist twice"
        if own == "schedule" and top == "torch":
            yield f"{where}: {name}: schedule/ is plain Python"
        used = rest.partition(".")[0]
        if top == "chipmunk_fx" and used != own and RANK.get(used, len(LAYERS)) >= RANK[own] and own != "cli":
            yield f"{where}: {own} may not import {name}"


SOURCES = [path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))]
LAYERED = [path for path in SOURCES if path != ROOT / "chipmunk_fx" / "__init__.py"]


def test_every_file_belongs_to_a_layer():
    assert {layer_of(path) for path in LAYERED} <= RANK.keys()


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path):
    assert not list(violations(path))


def test_violations_are_found(monkeypatch: pytest.MonkeyPatch):
    text = "import torch\nfrom chipmunk_fx.graph import plan\nimport patterns.mlp\nfrom chipmunk_fx.errors import x\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    found = list(violations(ROOT / "chipmunk_fx" / "schedule" / "some.py"))
    assert [line.split(": ")[0].rpartition(":")[2] for line in found] == ["1", "2", "3"]
