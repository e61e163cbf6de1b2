"""Along which dimensions a tensor surely says the same, whatever its inputs say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chipmunk_fx.graph.alike import alike
from tests.graph.capturing import traced

B, H, N = 2, 3, 5
Make = Callable[[Tensor], Tensor]

COPIED: dict[str, tuple[Make, list[int]]] = {
    "broadcast": (lambda x: x[:, None, None], [1, 2]),
    "expanded": (lambda x: x[:, None, None].expand(B, H, N, N), [1, 2]),
    "repeated": (lambda x: x.view(B, 1, 1, N).repeat(1, H, N, 1), [1, 2]),
    "repeated as a whole": (lambda x: x.repeat(H, 1, 1), [0]),
    "turned": (lambda x: x.view(B, 1, 1, N).repeat(1, 1, N, 1).transpose(2, 3), [1, 3]),
    "permuted": (lambda x: x[:, None].repeat(1, N, 1).permute(2, 0, 1), [2]),
    "interleaved": (lambda x: x[:, None, None].repeat_interleave(H, dim=1), [1, 2]),
    "interleaved in the batch": (lambda x: x[:, None].repeat_interleave(H, dim=0).view(B, H, -1, N), [1, 2]),
    "computed on": (lambda x: (x[:, None].repeat(1, N, 1) == 0).to(torch.float32)[:, None] * -1e4, [1, 2]),
    "two that agree": (lambda x: x[:, None].repeat(1, N, 1) + x[:, None], [1]),
    "two that do not": (lambda x: x[:, None] + x[:, :, None], []),
    "repeated where it differs": (lambda x: x.repeat(1, 2), []),
    "other runs": (lambda x: x[:, None].repeat_interleave(H, dim=0).view(H, B, -1, N), [2]),
    "written to": (lambda x: x[:, None].repeat(1, N, 1).index_fill_(1, torch.zeros(1, dtype=torch.long), 0.0), []),
}


@pytest.mark.parametrize("name", COPIED)
def test_dimensions(name: str):
    make, expected = COPIED[name]
    module = traced(make, torch.randn(B, N))
    (result,) = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes
    assert [d for d in range(result.meta["val"].dim()) if alike(result, d)] == expected


def test_nothing_that_is_said_alike_differs():
    """The values bear out what is said of each."""
    for make, expected in COPIED.values():
        value = make(torch.randn(B, N))
        assert all(torch.equal(value, value.narrow(d, 0, 1).expand_as(value)) for d in expected)
