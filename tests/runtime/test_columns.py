"""Which columns a model's groups list: random ones by the seed, and those that are always on."""

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import TinyDiT, calls, compiled, run

SIDE, WORDS = 32, 8  # a picture of 16x16 tokens behind the text
IMAGE = (SIDE // 2) ** 2


def lists(model: Any, kind: str, times: tuple[int, ...] = (900, 700)) -> Tensor:
    """int64 [heads x groups or groups, K]: what the one site of this kind lists after a generation."""
    run(model, calls(times, side=SIDE))
    (session,) = registry.sessions(model)
    caches = session.tracks[None].branches[0].caches.values()
    slot = {"attention": "rest", "mlp": "hidden"}[kind]
    (found,) = [cell.tensors["lists"] for sites in caches for cell in sites.values() if slot in cell.tensors]
    return found.flatten(0, -2).long()


def listed(model: Any) -> Tensor:
    """bool [heads x groups, WORDS + IMAGE]: which columns of attention."""
    rows = lists(model, "attention")
    return torch.zeros(len(rows), WORDS + IMAGE + 1, dtype=torch.bool).scatter_(1, rows, True)[:, : WORDS + IMAGE]


def patches(edge: int, reach: int) -> Tensor:
    """bool [groups of 16 rows, IMAGE]: the square of 8x8 patches around the one that holds a group of 4x4 tokens.

    Lines of patches run there and back.
    """
    side = SIDE // 2
    tokens = torch.arange(IMAGE).view(side, side)
    lines = [[tokens[y : y + 8, x : x + 8] for x in range(0, side, 8)] for y in range(0, side, 8)]
    outer = [patch for i, line in enumerate(lines) for patch in (line if i % 2 == 0 else line[::-1])]
    near = torch.zeros(len(outer), IMAGE, dtype=torch.bool)
    for i, own in enumerate(outer):
        for other in outer:
            y, x = (other[0, 0] // side - own[0, 0] // side) // 8, (other[0, 0] % side - own[0, 0] % side) // 8
            if max(abs(int(y)), abs(int(x))) <= reach:
                near[i, other.flatten()] = True
    return near.repeat_interleave(64 // edge**2, 0)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_random_columns_follow_the_seed(kind: str):
    settings: dict[str, Any] = {f"{kind}__random_density": 0.2, f"{kind}__density": 0.1}
    first, again, other = (lists(compiled(TinyDiT(), seed=seed, **settings), kind) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    none = [
        lists(compiled(TinyDiT(), seed=seed, **settings | {f"{kind}__random_density": 0.0}), kind) for seed in (3, 4)
    ]
    assert torch.equal(*none), "nothing but random columns depends on the seed"


def test_the_generator_is_left_alone():
    before = torch.get_rng_state()
    lists(compiled(TinyDiT(), attention__random_density=0.2), "attention")
    assert torch.equal(before, torch.get_rng_state())


def test_text_is_always_listed():
    assert listed(compiled(TinyDiT(), attention__density=0.02, attention__random_density=0.0))[:, :WORDS].all()


@pytest.mark.parametrize(("edge", "reach"), [(1, 0), (3, 1)])
def test_a_cube_of_voxels_is_always_listed(edge: int, reach: int):
    chosen = listed(compiled(TinyDiT(), attention__density=0.02, attention__local_voxels=edge))
    near = patches(4, reach)
    groups = IMAGE // 16
    for head in chosen.view(2, -1, WORDS + IMAGE):  # the last group is the text's
        assert (head[:groups, WORDS:] | ~near).all()
    plain = listed(compiled(TinyDiT(), attention__density=0.02)).view(2, -1, WORDS + IMAGE)
    assert not (plain[:, :groups, WORDS:] | ~near).all()


def test_what_one_group_always_lists_makes_no_other_list_longer():
    """The group of text has no place in the picture: its list is shorter by the 64 tokens of a patch, the density less."""
    model = compiled(TinyDiT(), attention__density=0.1, attention__local_voxels=1)
    chosen = listed(model).view(2, -1, WORDS + IMAGE)
    counts = chosen.sum(-1)
    assert (counts[:, :-1] == counts[0, 0]).all() and (counts[:, -1] == counts[0, 0] - 64).all()
    (site,) = [site for site in chipmunk_fx.summary(model).sites if site.kind == "attention"]
    assert site.density == pytest.approx(chosen.float().mean().item())


def test_a_window_along_the_order_is_always_listed():
    """A quarter of the sequence: a group's own 16 rows and 33 on either side of them."""
    ours = compiled(TinyDiT(), attention__density=0.02, attention__local_window=0.25)
    chosen = listed(ours).view(2, -1, WORDS + IMAGE)
    (session,) = registry.sessions(ours)
    order = next(t.order for (kind, *_), t in session.tracks[None].tables.items() if kind == "attention").long()
    for group in range(chosen.shape[1]):
        window = order[max(0, 16 * group - 33) : 16 * group + 16 + 33]
        assert chosen[:, group, window].all()
