"""The four operators that sparse models are made of; importing this package registers torch.ops.chipmunk.*."""

from chipmunk_fx.ops.library import NAMESPACE, REFERENCE

__all__ = ["NAMESPACE", "REFERENCE"]
