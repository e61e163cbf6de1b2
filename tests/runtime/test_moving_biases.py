"""MLPs with a bias that is computed from an input of the call: what it adds is up to date at every step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chipmunk_fx
from tests.harness.tolerance import assert_near, relative
from tests.runtime.models import SPARSE, chipmunk

OPTIONS = SPARSE | {"schedule.steps": 3, "schedule.branches": 1, "mlp.random_density": 0.0}


class Biased(nn.Module):
    """An MLP of tokens [B, N, 16] whose first or second bias is made of a condition [1, 16]."""

    def __init__(self, second: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2, self.second = nn.Linear(16, 128), nn.Linear(128, 16), second
        self.told = nn.Linear(16, 16 if second else 128)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        told = self.told(condition)[0]
        b1, b2 = (self.fc1.bias, told) if self.second else (told, self.fc2.bias)
        return F.linear(F.gelu(F.linear(x, self.fc1.weight, b1)), self.fc2.weight, b2)


class Convolved(Biased):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weights = self.fc1.weight[..., None], self.fc2.weight[..., None]
        hidden = F.gelu(F.conv1d(x.mT, weights[0], self.fc1.bias))
        return F.conv1d(hidden, weights[1], self.told(condition)[0]).mT


class Parallel(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(144, 16)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.linear(torch.cat([x.sin(), F.gelu(self.fc1(x))], -1), self.fc2.weight, self.told(condition)[0])


@torch.no_grad()
def last_of(model: nn.Module, density: float, drift: float) -> tuple[Tensor, Tensor]:
    """The third step of ours, a sparse one, and of the model; `drift`: how far tokens move from step to step."""
    torch._dynamo.reset()
    draw = torch.Generator().manual_seed(0)
    x, condition, move = (torch.randn(*shape, generator=draw) for shape in ((2, 48, 16), (1, 16), (2, 48, 16)))
    ours: Any = chipmunk(model, options=OPTIONS | {"mlp.density": density})
    for step in range(3):
        inputs = x + drift * step * move, condition + step
        got, want = ours(*inputs), model(*inputs)
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["refresh", "sparse", "sparse"]}
    assert [site.status for site in summary.sites] == ["rewritten"]
    return got, want


@pytest.mark.parametrize("make", [Biased, Convolved, Parallel])
def test_a_second_bias_that_moves_is_not_kept(make: type[Biased]):
    torch.manual_seed(0)
    assert_near(*last_of(make(), 0.2, drift=0.0))


def test_a_first_bias_moves_the_hidden_values_as_tokens_do():
    torch.manual_seed(0)
    model = Biased(second=False)
    errors = [relative(*last_of(model, density, drift=0.02)) for density in (0.2, 0.5, 0.8)]
    assert errors[0] > 2 * errors[2] and errors == sorted(errors, reverse=True), errors
