"""Which tests of kernels need which card."""

import pytest
import torch

from chipmunk_fx.kernels import devices, hopper

HOPPER = torch.cuda.is_available() and devices.capability(torch.device("cuda")) == hopper.CAPABILITY
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
