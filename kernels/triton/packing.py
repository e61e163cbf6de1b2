"""Lists of columns as bits and back: the format of chipmunk_fx.ops.packing.

Unpacking, at every sparse step, one program goes along a line: a running sum of the bits set gives each word its first place,
and each of its bits the number of those below. Packing, at a refresh, sets the bits of a cleared line one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import on_device_of
from chipmunk_fx.kernels.triton.tuning import padded

# Words of 32 bits at a time, four for each warp: with 16 for each it takes three times as long where many are full (H100).
WORDS = 32
WARPS = 8


def pack(lists: Tensor, bits: Tensor, keys: int) -> None:
    """As `chipmunk_fx.ops.packing.Bits.pack`."""
    lines, columns = lists.shape
    block = min(padded(columns), 1024)
    with on_device_of(bits):
        bits.zero_()
        words = _words(bits)
        _pack[(lines, triton.cdiv(columns, block))](lists, words, columns, keys, words.shape[1], BLOCK=block)


def unpack(bits: Tensor, lists: Tensor, keys: int) -> None:
    """As `chipmunk_fx.ops.packing.Bits.unpack`."""
    words = _words(bits)
    with on_device_of(bits):
        _unpack[(len(lists),)](words, lists, words.shape[1], lists.shape[1], keys, BLOCK=WORDS, num_warps=WARPS)


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
    bit = tl.arange(0, 32)[None, :]
    own = tl.full([1, 32], 1, tl.uint32) << bit.to(tl.uint32)
    found = 0
    for at in range(0, pitch, BLOCK):
        index = at + tl.arange(0, BLOCK)
        word = tl.load(words + index, mask=index < pitch, other=0).to(tl.uint32, bitcast=True)
        count = _ones(word)
        into = found + tl.cumsum(count, 0) - count
        word = tl.where(into + count <= columns, word, 0)[:, None]
        # [BLOCK, 32]: neighbours in a word are neighbours in the list
        tl.store(lists + (into[:, None] + _ones(word & (own - 1))), index[:, None] * 32 + bit, mask=(word & own) != 0)
        found += tl.sum(count, 0)
    for at in range(found, columns, 32 * BLOCK):
        place = at + tl.arange(0, 32 * BLOCK)
        tl.store(lists + place, tl.zeros([32 * BLOCK], tl.int32) + keys, mask=place < columns)


@triton.jit
def _ones(word):
    """Bits set in each uint32, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
