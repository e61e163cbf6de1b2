"""Which columns a group computes, on the device and without a synchronisation: the rules of chipmunk_fx.ops.selection.

One program a row of scores. Scores are not negative, so that their bits order like them. Short rows are held at once; of
long ones a sample brackets the threshold, and readings of the row narrow the bracket. One more pass writes the columns
taken and drawn in ascending order, each at the place that running sums give it.
"""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.tuning import padded

WHOLE = 16384  # scores of a row that one program holds
SAMPLE = 2048  # scores of a longer one that it takes at once
# H200, 23,640 rows of 75,600 codes, ms: 2048 by 8 warps 17.1; 1024 by 4 18.2; 4096 by 16 18.2, by 8 21.3; 8192 by 16 24.3
SCORES_A_WARP = 256
RANK_BITS = tl.constexpr(30)  # of fp32 scores; codes have 16
RANK_TOP = tl.constexpr((1 << 30) - 1)
LEAST_EXPONENT = tl.constexpr(72)  # biased, of the smallest code: 2^-55, the largest is below 2^9


def select(
    lists: Tensor, scores: Tensor, minus: Tensor | None, clock: Tensor, *, drawn: int, seed: int, site: int,
    first: int = 0, always: Tensor | None = None, valid: Tensor | None = None, rows_a_batch: int = 1,
    renewed: bool = False,
) -> None:  # fmt: skip
    """Write lists int32 [rows, K] from scores [rows, M], or from |scores - minus|; contiguous, or rows of scores apart.

    scores: fp32, or uint16 as `coded` makes them (without minus). clock int64 [2] on the device: the step feeds the draws;
    renewed: leave lists alone where clock[1] is 0. first: index of the first row of this call; always bool [1 or groups, M],
    valid bool [B, M], rows_a_batch: rows of each batch entry. Where too few columns are valid, M fills the places left.
    """
    rows, columns = lists.shape
    total = scores.shape[1]
    whole = total <= WHOLE
    block = padded(total, 128) if whole else SAMPLE
    _select[(rows,)](
        lists, scores, minus, always, valid, clock, columns, total, scores.stride(0), drawn,
        (seed ^ 0x5BD1E995) & 0x7FFFFFFF, site & 0x7FFFFFFF, first, rows_a_batch,
        1 if always is None else always.shape[0], RENEWED=renewed, WHOLE=whole, BLOCK=block,
        num_warps=min(max(block // SCORES_A_WARP, 4), 16),
    )  # fmt: skip


@triton.jit
def coded(mass):
    """uint16 of the order of fp32 scores from 2^-55 to 2^9, 1024 to an octave: what is closer counts as equal."""
    code = (mass.to(tl.int32, bitcast=True) >> 13) - (LEAST_EXPONENT << 10)
    return tl.minimum(tl.maximum(code, 0), 65534).to(tl.uint16)


@triton.jit(do_not_specialize=["seed", "site", "first"])
def _select(
    lists, scores, minus, always, valid, clock, columns, total, pitch, drawn, seed, site, first, rows_a_batch,
    always_rows, RENEWED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if RENEWED and tl.load(clock + 1) == 0:
        return
    lists += row.to(tl.int64) * columns
    scores += row.to(tl.int64) * pitch
    if minus is not None:
        minus += row.to(tl.int64) * pitch
    if valid is not None:
        valid += ((first + row) // rows_a_batch).to(tl.int64) * total
    if always is not None:
        always += ((first + row) % always_rows).to(tl.int64) * total
    eligible = total
    if valid is not None:
        eligible = _count(valid, total, BLOCK)
    wanted = tl.minimum(columns - drawn, eligible)
    if drawn >= eligible - wanted:  # all others would be drawn
        wanted = eligible
        drawn = 0
    free = eligible - wanted

    if WHOLE:
        low, high, above = _held(scores, minus, always, valid, total, wanted, BLOCK)
    else:
        low, high, above = _bracketed(scores, minus, always, valid, total, wanted, BLOCK)
    ties = wanted - above
    key = _mix(_mix(seed.to(tl.uint32) ^ _mix(site.to(tl.uint32))) + tl.load(clock).to(tl.uint32))
    key = _mix(key + (first + row).to(tl.uint32) * 0x9E3779B9)
    pace, offset = _pace(drawn, free, key)
    larger_before = 0
    ties_before = 0
    valid_before = 0
    for at in range(0, total, BLOCK):
        column = at + tl.arange(0, BLOCK)
        rank = _ranks(scores, minus, always, valid, column, total)
        larger = (rank >= high).to(tl.int32)
        tied = (rank >= low).to(tl.int32) - larger
        # both counts in one running sum: they stay below 2^16 in a block
        both = tl.cumsum(larger * 65536 + tied, 0)
        ties_to = ties_before + (both & 65535)
        taken_to = larger_before + (both >> 16) + tl.minimum(ties_to, ties)
        valid_to = column + 1
        if valid is not None:
            valid_to = valid_before + tl.cumsum((rank >= 0).to(tl.int32), 0)
        taken = (larger > 0) | ((tied > 0) & (ties_to <= ties))
        # draws up to here: the run of the last free column so far, and whether its draw lies behind
        draw_to, hit = _drawn(valid_to - taken_to, drawn, pace, offset, key)
        chosen = taken | (hit & (rank >= 0))
        tl.store(lists + taken_to + draw_to - 1, column, mask=chosen)
        counted = tl.sum(larger * 65536 + tied, 0)
        larger_before += counted >> 16
        ties_before += counted & 65535
        if valid is not None:
            valid_before += tl.sum((rank >= 0).to(tl.int32), 0)
    for at in range(wanted + drawn, columns, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(lists + place, tl.zeros([BLOCK], tl.int32) + total, mask=place < columns)


@triton.jit
def _ranks(scores, minus, always, valid, column, total):
    """Scores as integers of the same order; the largest for columns that are always on, -1 for those that may not be taken."""
    inside = column < total
    if scores.dtype.element_ty == tl.uint16:
        top = 65535
        rank = tl.load(scores + column, mask=inside, other=0).to(tl.int32)
    else:
        top = RANK_TOP
        score = tl.load(scores + column, mask=inside, other=0.0)
        if minus is not None:
            score = tl.abs(score - tl.load(minus + column, mask=inside, other=0.0))
        # a NaN may have either sign, and must not outrank what is always on
        rank = tl.minimum(tl.maximum(score.to(tl.int32, bitcast=True) >> 1, 0), top - 1)
    if always is not None:
        rank = tl.where(tl.load(always + column, mask=inside, other=0) != 0, top, rank)
    if valid is not None:
        inside = inside & (tl.load(valid + column, mask=inside, other=0) != 0)
    return tl.where(inside, rank, -1)


@triton.jit
def _held(scores, minus, always, valid, total, wanted, BLOCK: tl.constexpr):
    """low, high and the number of ranks >= high, such that taking these and the first of [low, high) gives those wanted."""
    rank = _ranks(scores, minus, always, valid, tl.arange(0, BLOCK), total)
    low = _quantile(rank, wanted, _bits(scores))
    return low, low + 1, tl.sum((rank > low).to(tl.int32), 0)


@triton.jit
def _bracketed(scores, minus, always, valid, total, wanted, BLOCK: tl.constexpr):
    """As `_held`, for rows that do not fit a block: each reading cuts the bracket that a sample gives into seven."""
    TOP: tl.constexpr = 1 << _bits(scores)
    cut = tl.arange(0, 8)
    rank = _ranks(scores, minus, always, valid, (tl.arange(0, BLOCK).to(tl.int64) * total // BLOCK).to(tl.int32), total)
    share = wanted * (BLOCK / total)
    slack = 3 * tl.sqrt(share) + 4
    low = _quantile(rank, tl.minimum(share + slack, BLOCK).to(tl.int32), _bits(scores))
    high = _quantile(rank, tl.maximum(share - slack, 0).to(tl.int32), _bits(scores)) + 1
    above = 0
    searching = wanted > 0
    if wanted == 0:
        low = TOP - 1
        high = TOP
    while searching:
        shift = 0
        while ((high - low - 1) >> shift) > 6:
            shift += 1
        # [8] ranks from low + (0 .. 7 << shift) on; the last has no end
        counts = _counted(scores, minus, always, valid, total, low, shift, BLOCK)
        at_least = tl.sum(tl.where(cut[None, :] >= cut[:, None], counts[None, :], 0), 1)
        passed = tl.sum((at_least >= wanted).to(tl.int32), 0)
        if passed == 0:
            high = low
            low = 0
        elif passed == 8:
            low = low + (7 << shift)
            high = TOP
        else:
            here = tl.sum(tl.where(cut == passed - 1, at_least, 0), 0)
            above = tl.sum(tl.where(cut == passed, at_least, 0), 0)
            low = low + ((passed - 1) << shift)
            high = low + (1 << shift)
            searching = (shift > 0) & (here != wanted)
            if here == wanted:
                high = low
                above = here
    return low, high, above


@triton.jit
def _quantile(rank, wanted, BITS: tl.constexpr):
    """The largest of BITS bits that at least `wanted` of the ranks reach; 0 where too few are not negative."""
    low = 0
    for bit in range(BITS):
        middle = low + (1 << (BITS - 1 - bit))
        if tl.sum((rank >= middle).to(tl.int32), 0) >= wanted:
            low = middle
    return low


@triton.jit
def _counted(scores, minus, always, valid, total, low, shift, BLOCK: tl.constexpr):
    """[8]: the ranks in each of seven ranges of 2^shift from `low` on, and those beyond."""
    field = tl.arange(0, 8)
    counts = tl.zeros([8], tl.int32)
    # eight counters of a byte in one word, emptied before one can overflow
    for part in range(0, total, 255 * BLOCK):
        packed = tl.zeros([BLOCK], tl.int64)
        for at in range(part, tl.minimum(part + 255 * BLOCK, total), BLOCK):
            rank = _ranks(scores, minus, always, valid, at + tl.arange(0, BLOCK), total)
            range_ = tl.minimum((rank - low) >> shift, 7)
            packed += tl.where(rank >= low, 1, 0).to(tl.int64) << (tl.maximum(range_, 0) * 8).to(tl.int64)
        counts += tl.sum(((packed[:, None] >> (field[None, :] * 8).to(tl.int64)) & 255).to(tl.int32), 0)
    return counts


@triton.jit
def _count(mask, total, BLOCK: tl.constexpr):
    found = tl.zeros([BLOCK], tl.int32)
    for at in range(0, total, BLOCK):
        column = at + tl.arange(0, BLOCK)
        found += (tl.load(mask + column, mask=column < total, other=0) != 0).to(tl.int32)
    return tl.sum(found, 0)


@triton.constexpr_function
def _bits(scores):
    return 16 if scores.type.element_ty == tl.uint16 else RANK_BITS.value


@triton.jit
def _pace(draws, free, key):
    """uint32 p and o: the r-th free column (from 0) covers [o + r p, o + (r + 1) p) of a line with 2^32 for each draw."""
    several = tl.maximum(free, 1).to(tl.int64)
    pace = (draws.to(tl.int64) << 32) // several
    # hashed, so that where the part of a draw ends favours no column
    offset = (_mix(key).to(tl.int64) * pace) >> 32
    if ((several - 1) * pace) >> 32 != draws - 1:  # the last draw must have a column to begin in
        pace += 1
        offset *= 0
    return pace.to(tl.uint32), offset.to(tl.uint32)


@triton.jit
def _drawn(count, draws, pace, offset, key):
    """How many of the first `count` free columns are drawn, and whether the last of them is.

    A draw is a hashed point of its 2^32: it takes the column that begins last before it, or else the first one there.
    """
    last = (tl.maximum(count, 1) - 1).to(tl.uint64) * pace.to(tl.uint64) + offset.to(tl.uint64)
    draw = (last >> 32).to(tl.uint32)
    begin = last.to(tl.uint32)
    point = _mix(key + (draw + 1) * 0x9E3779B9)
    covered = point - begin < pace
    before = point < begin
    hit = (before & (begin < pace)) | ((point >= begin) & covered)
    passed = draw.to(tl.int32) + (before | covered).to(tl.int32)
    some = tl.minimum(count, draws) > 0
    return tl.where(some, passed, 0), some & hit


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain) of a uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
