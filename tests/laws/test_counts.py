"""What is found in the models of the zoo is what is in them."""

import pytest
import torch

import chipmunk_fx
from tests.harness.zoo import build, facts, names


@pytest.mark.parametrize("name", names())
def test_attention_mlp_and_timestep_are_found(name: str):
    torch._dynamo.reset()
    model, inputs = build(name)
    report, known = chipmunk_fx.explain(model, **inputs), facts(name)
    print(f"{name}: {report.accepted_coverage:.1%} of the operations are in accepted sites")
    assert (report.count("attention"), report.count("mlp")) == (known["attention"], known["mlp"]), str(report)
    assert report.timestep in known["timestep"].split(", ")
