"""When flash-attn-4 is taken, and that its failure costs one warning; a stand-in plays the library."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_fx.ops import flash4
from chipmunk_fx.ops.dense import attend

CALLS: list[dict[str, Any]] = []
BOTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def stand_in(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    CALLS.append({"shape": tuple(q.shape), "lse": return_lse})
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).double() for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
    scores = softmax_scale * q @ k.mT
    return (scores.softmax(-1) @ v).transpose(1, 2).float(), scores.logsumexp(-1).float()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An installed package; on a CPU the call reaches it where `takes` says so."""
    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = stand_in  # pyright: ignore
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(flash4, "find_spec", lambda name: name)
    forget()
    CALLS.clear()
    yield module
    forget()


def forget() -> None:
    flash4._imported.cache_clear()
    flash4._tried.cache_clear()


class OnHopper:
    """The parts of a tensor that the choice looks at, without a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, rows: int, width: int = 128) -> None:
        self.shape = (1, 2, rows, width)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "works", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def takes(q: Any, k: Any, valid: Any = None) -> bool:
    return flash4.takes(q, k, valid)


def test_long_sequences_on_hopper_are_taken(library: ModuleType, hopper: None):
    long, short = OnHopper(flash4.ROWS), OnHopper(4352)
    assert takes(long, long)
    assert not takes(short, short) and not takes(long, short) and not takes(short, long)
    assert not takes(long, long, valid=torch.ones(1, flash4.ROWS))
    assert not takes(OnHopper(flash4.ROWS, width=256), long)


def test_a_choice_of_kernel_is_kept(library: ModuleType, hopper: None):
    long = OnHopper(flash4.ROWS)
    for chosen in BOTH:
        with sdpa_kernel(chosen):
            assert not takes(long, long)
    with sdpa_kernel([*BOTH, SDPBackend.MATH], set_priority=True):
        assert takes(long, long)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_cards_and_types_are_not(capability: tuple[int, int]):
    assert not flash4.pays(capability, torch.bfloat16, 128, 1 << 17)
    assert not flash4.pays((9, 0), torch.float32, 128, 1 << 17)


def test_without_the_package_nothing_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="flash_attn")

    monkeypatch.setattr(flash4, "find_spec", missing)
    forget()
    assert not flash4.works(*operands()[:2]) and not caplog.records
    forget()


def operands(heads: int = 4, key_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, 24, 16), torch.randn(2, key_heads, 40, 16), torch.randn(2, key_heads, 40, 16)


def test_its_result_is_that_of_the_others(library: ModuleType, monkeypatch: pytest.MonkeyPatch):
    q, k, v = operands()
    out, lse = attend(q, k, v, 0.3)
    monkeypatch.setattr(flash4, "takes", lambda *_: True)
    ours, ours_lse = attend(q, k, v, 0.3)
    assert CALLS == [{"shape": (2, 24, 4, 16), "lse": True}]
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(ours_lse, lse)


def test_a_failure_falls_back_with_one_warning(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    q, k, v = operands()
    out, _ = attend(q, k, v, 0.3)
    library.flash_attn_func = broken  # pyright: ignore
    monkeypatch.setattr(flash4, "takes", lambda q, k, _: flash4.works(q, k))
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v, 0.3)[0], out)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such instruction" in caplog.text and not flash4.works(q, k)
