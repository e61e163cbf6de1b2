"""Whether caches hold nan or inf: told by the device to the host without either waiting for the other."""

from __future__ import annotations

import torch


class Health:
    """`flag`: bool [1] on the device, set by the ops. The host looks at a copy that was sent after the last step.

    Where nothing else makes the host wait for the device, the copy may be a step late.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.flag = torch.zeros(1, dtype=torch.bool, device=device)
            on_device = device.type == "cuda"
            self.seen = torch.zeros(1, dtype=torch.bool, device="cpu", pin_memory=True) if on_device else self.flag

    def send(self) -> None:
        if self.seen is not self.flag:
            self.seen.copy_(self.flag, non_blocking=True)

    @property
    def told(self) -> bool:
        """Whether the host knows of nan or inf."""
        return bool(self.seen.item())

    def broken(self) -> bool:
        """Whether something was found since the last time this was true."""
        found = self.told
        if found:
            self.clear()
        return found

    def clear(self) -> None:
        """What was found lies in caches that are of no use any more."""
        self.flag.zero_()
        self.seen.zero_()
