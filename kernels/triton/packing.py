"""Lists of columns as bits and back: the format of chipmunk_fx.ops.packing.

Unpacking, at every sparse step, one program goes along a line: a running sum of the bits set gives each word its first place.
Where many are set, each bit of a word has a lane and the place of how many lie below it; where few are, words give up
their lowest bits in turns, as often as the fullest of a block has any. Packing, at a refresh, joins the bits of neighbours in
a list that share a word, which the last of them writes to a cleared line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import on_device_of
from chipmunk_fx.kernels.triton.tuning import padded

# From this share of the keys on, lanes stand for the bits of a word, else for words. H100, ms for a quarter of Wan's lists (0.29
# of 75,600 keys) and of HunyuanVideo's (0.06 of 119,056), words and warps of a program:
MANY = 0.125  # 32, 8: 0.36 and 0.36; 64, 8: 0.7; 128, 8: 1.2
MANY_TILE = {"BLOCK": 32, "num_warps": 8}
FEW_TILE = {"BLOCK": 128, "num_warps": 4}  # 1.2 and 0.14; 1024 words, 4 warps: 1.7 and 0.21


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
    words, columns = _words(bits), lists.shape[1]
    many = columns > MANY * keys
    with on_device_of(bits):
        _unpack[(len(lists),)](
            words, lists, words.shape[1], columns, keys, MANY=many, **(MANY_TILE if many else FEW_TILE)
        )


def _words(bits: Tensor) -> Tensor:
    """int32 [L, W / 4]: bit j of word i of a line stands for column 32 i + j."""
    return bits.view(torch.int32)


@triton.jit
def _pack(lists, words, columns, keys, pitch, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    lists += line * columns
    words += line * pitch
    place = first + tl.arange(0, BLOCK)
    column = tl.load(lists + place, mask=place < columns, other=keys)
    following = tl.load(lists + place + 1, mask=place + 1 < columns, other=keys)
    word = tl.where(column < keys, column >> 5, -1)
    following = tl.where(following < keys, following >> 5, -1)
    bits = tl.full([BLOCK], 1, tl.int32) << (column & 31)
    _, joined = tl.associative_scan((word, bits), 0, _join)
    # a word may have begun in the block before, or go on in the next one
    begins = tl.load(lists + first) >> 5
    ends = place == first + BLOCK - 1
    last = (word >= 0) & ((word != following) | ends)
    shared = (word == begins) | ends
    tl.store(words + word, joined, mask=last & ~shared)
    tl.atomic_or(words + word, joined, mask=last & shared, sem="relaxed")


@triton.jit
def _join(word, bits, next_word, next_bits):
    return next_word, next_bits | tl.where(word == next_word, bits, 0)


@triton.jit
def _unpack(words, lists, pitch, columns, keys, BLOCK: tl.constexpr, MANY: tl.constexpr):
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
        word = tl.where(into + count <= columns, word, 0)
        if MANY:  # [BLOCK, 32]: neighbours in a word are neighbours in the list
            place = into[:, None] + _ones(word[:, None] & (own - 1))
            tl.store(lists + place, index[:, None] * 32 + bit, mask=(word[:, None] & own) != 0)
        else:
            for _ in range(tl.max(count, 0)):
                lowest = word & (~word + 1)
                tl.store(lists + into, index * 32 + _ones(lowest - 1), mask=word != 0)
                word ^= lowest
                into += 1
        found += tl.sum(count, 0)
    for at in range(found, columns, 1024):
        place = at + tl.arange(0, 1024)
        tl.store(lists + place, tl.zeros([1024], tl.int32) + keys, mask=place < columns)


@triton.jit
def _ones(word):
    """Bits set in each uint32, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
