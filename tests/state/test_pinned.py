"""Page-locked memory: as much as is asked for, until it goes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chipmunk_fx.state import pinned as module
from chipmunk_fx.state.pinned import pinned

DEVICE = torch.device("cpu")


class Driver:
    """Remembers what is registered."""

    def __init__(self, refuses: bool = False) -> None:
        self.held: dict[int, int] = {}
        self.unlocked_while_mapped: list[bool] = []
        self.refuses = refuses

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.held |= {} if self.refuses else {pointer: size}
        return 801 if self.refuses else 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.held[pointer]
        maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        self.unlocked_while_mapped.append(any(int(low, 16) <= pointer < int(high, 16) for low, high in maps))
        return 0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", found.append)
    return found


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int32, torch.float32])
def test_it_is_exactly_as_large_as_asked_and_freed_with_the_last_view(
    dtype: torch.dtype, waits: list[torch.device], monkeypatch: pytest.MonkeyPatch
):
    use(monkeypatch, driver := Driver())
    tensor = pinned((3, 5, 1000), dtype, DEVICE)
    assert tensor.shape == (3, 5, 1000) and tensor.dtype == dtype and not tensor.any()
    assert driver.held == {tensor.data_ptr(): 15000 * dtype.itemsize}
    view = tensor[1].fill_(1)
    del tensor
    assert driver.held and not waits and view.sum() == 5000
    del view
    assert not driver.held and waits == [DEVICE], "copies under way were waited for"
    assert driver.unlocked_while_mapped == [True]


@pytest.mark.parametrize("missing", [True, False])
def test_where_that_cannot_be_pytorch_pins(missing: bool, monkeypatch: pytest.MonkeyPatch):
    """On a system without anonymous mappings, or where the driver refuses."""
    asked: dict[str, Any] = {}
    use(monkeypatch, Driver(refuses=True))
    if missing:
        monkeypatch.setattr(module, "_KINDS", ("MAP_NOWHERE",))
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, **how: asked.update(how) or zeros(*shape, dtype=how.get("dtype"))
    )
    assert pinned((2, 3), torch.float32, DEVICE).shape == (2, 3) and asked["pin_memory"] is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="locks pages for a device")
def test_a_device_copies_to_and_from_it():
    host = pinned((1000, 1000), torch.bfloat16, torch.device("cuda"))
    assert host.is_pinned()
    device = torch.randn(1000, 1000, device="cuda").bfloat16()
    host.copy_(device, non_blocking=True)
    back = torch.empty_like(device).copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, device) and torch.equal(host, device.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="locks pages for a device")
def test_what_the_driver_refuses_is_not_raised_by_the_next_kernel():
    device = torch.device("cuda")
    host = pinned((4096,), torch.uint8, device)
    memory = module._pages(4096)
    assert not module._register(host.data_ptr(), memoryview(memory), memory, device), "these pages are locked already"
    assert (torch.ones(4, device=device) + 1).sum() == 8
