"""Kernels go to the device of what they work on, whichever is the current one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chipmunk_fx.kernels import hopper
from chipmunk_fx.kernels.hopper import nvrtc

CURRENT = [0]


@contextmanager
def switched(device: torch.device) -> Iterator[None]:
    before, CURRENT[0] = CURRENT[0], device.index
    try:
        yield
    finally:
        CURRENT[0] = before


def elsewhere(*shape: int) -> Any:
    """What a tensor of a GPU that is not the current one tells of itself."""
    sizes = torch.Size(shape)
    return SimpleNamespace(
        device=torch.device("cuda", 1), is_cuda=True, shape=sizes, numel=sizes.numel, data_ptr=lambda: 4096
    )


def test_a_watch_of_another_gpu_is_loaded_and_launched_there(monkeypatch: pytest.MonkeyPatch):
    """A module is loaded into the current device's context, and launched on its streams."""
    at: list[int] = []
    loaded = SimpleNamespace(launch=lambda *_: at.append(CURRENT[0]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CURRENT[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(nvrtc, "kernel", lambda *_, **__: at.append(CURRENT[0]) or loaded)
    hopper.cache_watch(cache=elsewhere(1, 64, 512), broken=elsewhere(1), columns=64)
    assert at == [1, 1] and CURRENT == [0]
