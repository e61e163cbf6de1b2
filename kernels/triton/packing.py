"""Lists of columns as bits and back: the format of chipmunk_fx.ops.packing.

Unpacking, at every sparse step, one program goes along a line: a running sum of the bits set gives each word its first place,
and the words of a block give up their lowest bits in turns, as often as the fullest has any. Packing, at a refresh, sets the
bits of a cleared line one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import on_device_of
from chipmunk_fx.kernels.triton.tuning import Tile, packing_tile, padded


def pack(lists: Tensor, bits: Tensor, keys: int) -> None:
    """As `chipmunk_fx.ops.packing.Bits.pack`."""
    lines, columns = lists.shape
    block = min(padded(columns), 1024)
    with on_device_of(bits):
        bits.zero_()
        words = _words(bits)
        _pack[(lines, triton.cdiv(columns, block))](lists, words, columns, keys, words.shape[1], BLOCK=block)


def unpack(bits: Tensor, lists: Tensor, keys: int, tile: Tile | None = None) -> None:
    """As `chipmunk_fx.ops.packing.Bits.unpack`."""
    words = _words(bits)
    tile = tile or packing_tile(words.shape[1])
    with on_device_of(bits):
        _unpack[(len(lists),)](words, lists, words.shape[1], lists.shape[1], keys, BLOCK=tile.columns, **tile.launch)


def _words(bits: Tensor) -> Tensor:
    """int32 [L, W / 4]: bit j of word i of a line stands for column 32 i + j."""
    return bits.view(torch.int32)


@triton.jit
def _pack(lists, words, columns, keys, pitch, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(lists + line * columns + place, mask=place < columns, other=keys)
    bit = tl.full([BLOCK], 1, tl.int32) << (column & 31)
    tl.atomic_or(words + line * pitch + (column >> 5), bit, mask=column < keys, sem="relaxed")


@triton.jit
def _unpack(words, lists, pitch, columns, keys, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    words += line * pitch
    lists += line * columns
    found = 0
    for at in range(0, pitch, BLOCK):
        index = at + tl.arange(0, BLOCK)
        word = tl.load(words + index, mask=index < pitch, other=0).to(tl.uint32, bitcast=True)
        count = _ones(word)
        into = found + tl.cumsum(count, 0) - count
        word = tl.where(into + count <= columns, word, 0)
        for _ in range(tl.max(count, 0)):
            lowest = word & (~word + 1)
            # a power of two is exact in fp32, and its exponent is the bit's number
            bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(lists + into, index * 32 + bit, mask=word != 0)
            word ^= lowest
            into += 1
        found += tl.sum(count, 0)
    for at in range(found, columns, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(lists + place, tl.zeros([BLOCK], tl.int32) + keys, mask=place < columns)


@triton.jit
def _ones(word):
    """Bits set in each uint32, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
