"""Lists of columns between steps, in the fewest bytes: as bits, as 16-bit or as 32-bit indices.

Kernels read and write int32 lists [B, H, G, K], ascending, with the number of keys in the last places where fewer are valid.
What is kept from step to step is one of

    uint8 [B H G W + K]   bits: a line of W bytes for each list, bit j of its byte i stands for column 8 i + j. K bytes that
                          nobody reads follow, so that K is told by the shape alone: no graph has it as a constant
    int16 [B, H, G, K]    indices, to be read as unsigned
    int32 [B, H, G, K]    as they are, without a copy

of which dtype and shape say which. Which one is best is told from M, the number of all keys, before any are cut off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chipmunk_fx.ops.groups import group_count

ALIGNED = 16  # bytes: where lines of bits may begin
# A CPU core takes 14 ms at best to find the columns in the bits of 768 lists of 4096 keys, beside 440 ms of sparse attention;
# for 16-bit indices 0.1 ms.
BITS_ON = ("cuda",)
_MASK_BYTES = 1 << 28  # of lines spread out at once


def smallest(lists: Sequence[int], keys: int, device: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept of lists of that shape, columns of `keys`, on a device of this type."""
    batch, heads, groups, columns = lists
    lines = batch * heads * groups
    sizes = {torch.int32: 4 * lines * columns}
    if keys <= 0xFFFF:  # the mark of no column is as large
        sizes[torch.int16] = 2 * lines * columns
    if device in BITS_ON:
        sizes[torch.uint8] = lines * line_bytes(keys) + columns
    dtype = min(sizes, key=lambda dtype: sizes[dtype])
    return ((sizes[dtype],) if dtype == torch.uint8 else tuple(lists)), dtype


def line_bytes(keys: int) -> int:
    return -(-keys // (8 * ALIGNED)) * ALIGNED


class Bits(NamedTuple):
    """How lists int32 [L, K], contiguous, become lines of bits uint8 [L, W] and come back; nothing waits for the device.

    pack(lists, bits, keys): columns of `keys` and beyond are none. unpack(bits, lists, keys): `keys` fills places left.
    """

    pack: Callable[[Tensor, Tensor, int], None]
    unpack: Callable[[Tensor, Tensor, int], None]


@dataclass(frozen=True)
class Kept:
    """The cache of one call's lists. shape: theirs, (B, H, G, K); keys: M, of which a call may see a part."""

    cache: Tensor
    shape: tuple[int, int, int, int]
    keys: int

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Kept | None":
        """From an operator's arguments; None where its lists are int32 or it has none."""
        cache, q = arguments.get("lists"), arguments.get("q")
        if q is None or cache is None or cache.dtype == torch.int32:
            return None
        keys, order = arguments["k"].shape[2], arguments["order"]
        groups = group_count(q.shape[2] if order is None else order.shape[0], arguments["group_rows"])
        lines = q.shape[0] * q.shape[1] * groups
        columns = cache.shape[0] - lines * line_bytes(keys) if cache.dtype == torch.uint8 else cache.shape[3]
        return cls(cache, (q.shape[0], q.shape[1], groups, columns), keys)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=torch.int32, device=self.cache.device)

    def unpacked(self, keys: int, bits: Bits) -> Tensor:
        """int32 [B, H, G, K] for a call that sees `keys` keys."""
        if self.cache.dtype != torch.uint8:
            return self.cache.view(torch.uint16).int()
        lists = self.empty()
        bits.unpack(self._lines, lists.view(-1, self.shape[3]), keys)
        return lists

    def pack(self, lists: Tensor, keys: int, bits: Bits) -> None:
        """Keep `lists`, chosen by a call that sees `keys` keys."""
        if self.cache.dtype != torch.uint8:
            self.cache.view(torch.uint16).copy_(lists)
        else:
            bits.pack(lists.view(-1, self.shape[3]), self._lines, keys)

    @property
    def _lines(self) -> Tensor:
        width = line_bytes(self.keys)
        return self.cache[: self.cache.shape[0] - self.shape[3]].view(-1, width)


def pack_bits(lists: Tensor, bits: Tensor, keys: int) -> None:
    """`Bits.pack` in plain PyTorch."""
    width = 8 * bits.shape[1]
    for some, line in _chunks(lists, bits):
        listed = torch.zeros(len(some), width + 8, dtype=torch.bool, device=bits.device)
        listed.scatter_(1, some.masked_fill(some >= keys, width).long(), True)
        # the product moves the lowest bits of eight bytes side by side into the highest byte
        words = listed[:, :width].contiguous().view(torch.int64) * 0x0102040810204080
        line.copy_((words >> 56) & 0xFF)


def unpack_bits(bits: Tensor, lists: Tensor, keys: int) -> None:
    """`Bits.unpack` in plain PyTorch."""
    columns, device = lists.shape[1], bits.device
    byte = torch.arange(256, device=device).unsqueeze(1)
    spread = ((byte >> torch.arange(8, device=device)) & 1).to(torch.uint8).view(torch.int64).squeeze(1)
    every = torch.arange(8 * bits.shape[1], dtype=torch.int32, device=device)
    for some, line in _chunks(lists, bits):
        listed = spread[line.int()].view(torch.bool)
        place = listed.cumsum(1, dtype=torch.int32) - 1
        place.masked_fill_(~listed | (place >= columns), columns)
        wide = some.new_full((len(some), columns + 1), keys)
        some.copy_(wide.scatter_(1, place.long(), every.expand_as(place))[:, :columns])


PLAIN = Bits(pack_bits, unpack_bits)


def _chunks(lists: Tensor, bits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A few lines at a time, of each as many bytes are held as there are columns, or a small multiple of it."""
    at_once = max(1, _MASK_BYTES // (8 * bits.shape[1]))
    return list(zip(lists.split(at_once), bits.split(at_once), strict=True))
