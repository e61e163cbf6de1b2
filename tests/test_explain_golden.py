"""What `explain` shows of a hand-written model, word for word.

CHIPMUNK_ACCEPT=1 writes the golden files anew: look at the difference before keeping it.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.runtime.report import Report
from tests.golden.explained import Explained

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def report() -> Report:
    options = {"gate": "off", "attention.dense_layers": 1, "mlp.dense_layers": 0}
    inputs = torch.randn(1, 4, 16, 16), torch.full((1,), 500.0), torch.randn(1, 8, 16)
    return chipmunk_fx.explain(Explained().eval(), *inputs, config=options)


def assert_golden(name: str, shown: str) -> None:
    file = GOLDEN / name
    if os.environ.get("CHIPMUNK_ACCEPT") == "1":
        file.write_text(shown + "\n")
    assert shown + "\n" == file.read_text(), f"{file.name} differs; CHIPMUNK_ACCEPT=1 accepts what is shown now"


def test_text(report: Report):
    assert_golden("explain.txt", "\n".join(line.rstrip() for line in str(report).splitlines()))


def test_json(report: Report):
    assert_golden("explain.json", report.to_json())


def test_json_says_what_the_fields_say(report: Report):
    told = json.loads(report.to_json())
    assert len(told["sites"]) == len(report.sites)
    for entry, site in zip(told["sites"], report.sites, strict=True):
        assert entry | {"shape": tuple(entry["shape"])} == vars(site)
    assert told["summary"]["attention"] == report.tally("attention")


def test_every_near_miss_says_where_it_ended_and_why(report: Report):
    odd = {s.name.removeprefix("odd."): s for s in report.sites if s.name.startswith("odd.")}
    assert {name.split(".")[0] for name in odd} == Explained().odd.keys()
    for name, site in odd.items():
        assert site.status == "dense" and site.reason and site.where, name
        assert site.accepted or (site.pattern and site.node and site.constraint), name  # a full mask is understood
        assert site.where.startswith("explained.py:"), name
