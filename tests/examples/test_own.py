"""The example of a model that is nobody else's."""

from collections.abc import Iterator

import pytest

from tests.examples.scripts import EXAMPLES, script
from tests.runtime.models import one_thread

pytest.importorskip("PIL")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_grid_is_set_and_a_density_is_chosen(capsys: pytest.CaptureFixture[str]):
    with script("own", "main") as own:
        done = own("--steps", 6, "--densities", 0.1, 0.5, 1.0, "--error", 1e-5)
    assert "raster order" in done["before"].geometry and done["after"].geometry == "option tokens.grid"
    assert done["after"].count("attention") == 4 and done["after"].count("attention", "rewritten") == 2
    errors = [row["error"] for row in done["rows"]]
    assert errors[0] > errors[1] > 1e-5 > errors[2], "every column is computed at density 1"
    assert done["rows"][0]["operations"] < done["rows"][1]["operations"]
    assert done["chosen"] == 1.0 and "attention.density: 1.0" in capsys.readouterr().out
    assert done["summary"].phases == {0: ["refresh", "sparse", "sparse", "sparse", "sparse", "refresh"]}
    assert not done["summary"].fallbacks


def test_nothing_is_chosen_where_nothing_is_near_enough(capsys: pytest.CaptureFixture[str]):
    with script("own", "main") as own:
        done = own("--steps", 3, "--densities", 0.05, "--error", 1e-9)
    assert done["chosen"] is None and "no density is within 1e-09" in capsys.readouterr().out


def test_the_model_fits_eighty_lines():
    lines = (EXAMPLES / "own.py").read_text().splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(text)) for text in ("class Bl", "@torch"))
    assert last - first < 80
