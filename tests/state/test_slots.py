"""Shapes, sizes and counts of what a site keeps."""

import pytest
import torch

from chipmunk_fx.ops.cases import ATTENTION_CASES, MLP_CASES, AttentionCase, MlpCase
from chipmunk_fx.state.slots import Slot, attention_slots, columns, mlp_slots


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"total": 4096, "density": 0.165}, 676),
        ({"total": 4096, "density": 0.165, "random_density": 0.01, "always": 16}, 733),
        ({"total": 4096, "density": 0.165, "random_density": 0.01, "always": 16, "tile": 32}, 736),
        ({"total": 30, "density": 0.1}, 3),
        ({"total": 63, "density": 1.0, "random_density": 0.1, "always": 5, "tile": 16}, 63),
        ({"total": 1000, "density": 1e-6}, 1),
    ],
)
def test_columns(arguments: dict, expected: int):
    assert columns(**arguments) == expected


def test_bytes_of_a_video_site():
    """HunyuanVideo at 720x1280x129 keeps 0.73 GB of attention output a site in bf16; a CPU keeps its lists as they are."""
    rest, share, lists = attention_slots(1, 24, 119056, 119056, 128, torch.bfloat16, group_rows=192, columns=8064)
    assert rest.bytes == 24 * 119056 * 128 * 2 == 731_480_064
    assert share.bytes == 24 * 119056 * 4
    assert lists == Slot("lists", (1, 24, 621, 8064), torch.int32)


def test_bytes_of_packed_lists():
    """A bit a key, in lines of whole 16 bytes, where that is less than an index a column; K bytes tell K."""

    def lists(keys: int, columns: int, device: str) -> Slot:
        rows = 119056
        return attention_slots(
            1, 24, rows, keys, 128, torch.bfloat16, group_rows=128, columns=columns, device=device
        )[2]  # fmt: skip

    video = lists(119056, 8064, "cuda")
    assert video == Slot("lists", (24 * 931 * 14896 + 8064,), torch.uint8) and video.bytes == 332_844_288
    assert lists(119056, 8064, "cpu").bytes == 4 * 24 * 931 * 8064
    assert lists(119056, 1600, "cuda").dtype == torch.int32  # few of many: indices are shorter
    for keys, count, dtype in ((4096, 2000, torch.uint8), (40_000, 2000, torch.int16), (4096, 736, torch.int32)):
        assert lists(keys, count, "cuda").dtype == dtype  # the last: less than an eighth of the rest
        assert lists(keys, count, "cpu") == Slot("lists", (1, 24, 931, count), torch.int16)
    assert lists(65536, 16, "cuda").dtype == lists(65536, 16, "cpu").dtype == torch.int32


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=repr)
def test_attention_slots_are_what_the_operators_take(case: AttentionCase):
    values = case.values(torch.bfloat16)
    slots = attention_slots(
        case.batch, case.heads, case.rows, case.keys, case.width, torch.bfloat16,
        grouped_rows=case.grouped, group_rows=case.group_rows, columns=case.columns,
    )  # fmt: skip
    assert [(s.name, s.shape, s.dtype) for s in slots[:2]] == described(values, "rest", "share")
    assert slots[2].shape == values["lists"].shape and slots[2].dtype == torch.int16


@pytest.mark.parametrize("case", MLP_CASES, ids=repr)
def test_mlp_slots_are_what_the_operators_take(case: MlpCase):
    values = case.values(torch.float16)
    slots = mlp_slots(
        case.batch, case.rows, case.neurons, case.result, torch.float16,
        group_rows=case.group_rows, columns=case.columns,
        fp8=(1 + case.gated, case.width) if case.fp8 else None,
    )  # fmt: skip
    names = ["hidden", "out", "mean", "lists", "by_neuron", *(["w1_fp8", "scales", "change_scale"] if case.fp8 else [])]
    assert [(s.name, s.shape, s.dtype) for s in slots] == described(values, *names)
    assert {s.name for s in slots if s.shared} == {*names[4:]} - {"change_scale"}


def described(values: dict, *names: str) -> list:
    return [(name, tuple(values[name].shape), values[name].dtype) for name in names]
