"""Which tests of kernels need which card."""

import pytest
import torch

from chipmunk_fx.kernels import devices, hopper

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or devices.capability(torch.device("cuda")) != hopper.CAPABILITY,
    reason="needs a Hopper GPU",
)
