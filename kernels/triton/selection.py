"""Which columns a group computes, on the device and without a synchronisation: the rules of chipmunk_fx.ops.selection.

One program a row of scores. Scores are not negative, so that their bits order like them. Short rows are held at once; of
long ones a sample brackets the threshold, and a histogram of the bracket tells it. One more pass writes the columns taken and
drawn in ascending order, each at the place that running sums give it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.tuning import padded

WHOLE = 16384  # scores of a row that one program holds
HELD_A_WARP = 1024  # of them, where it does
SAMPLE = 2048  # scores of a longer one that the bracket comes from
LONG_WARPS = 8  # of a program for such a row
BINS = 1024  # of a histogram: at 2^-10 of an octave a code, a bracket rarely spans more
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
    warps = min(max(block // HELD_A_WARP, 4), 16) if whole else LONG_WARPS
    counts = None if whole else torch.empty(rows, BINS, dtype=torch.int32, device=scores.device)
    run = 16 // scores.element_size()  # neighbours that a thread reads at once
    _select[(rows,)](
        lists, scores, minus, always, valid, clock, counts, columns, total, scores.stride(0), drawn,
        (seed ^ 0x5BD1E995) & 0x7FFFFFFF, site & 0x7FFFFFFF, first, rows_a_batch,
        1 if always is None else always.shape[0], RENEWED=renewed, WHOLE=whole, BLOCK=block, BINS=BINS,
        LINES=32 * warps, RUN=run, num_warps=warps,
    )  # fmt: skip


@triton.jit
def coded(mass):
    """uint16 of the order of fp32 scores from 2^-55 to 2^9, 1024 to an octave: what is closer counts as equal."""
    code = (mass.to(tl.int32, bitcast=True) >> 13) - (LEAST_EXPONENT << 10)
    return tl.minimum(tl.maximum(code, 0), 65534).to(tl.uint16)


@triton.jit(do_not_specialize=["seed", "site", "first"])
def _select(
    lists, scores, minus, always, valid, clock, counts, columns, total, pitch, drawn, seed, site, first, rows_a_batch,
    always_rows, RENEWED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    LINES: tl.constexpr, RUN: tl.constexpr,
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
        counts += row.to(tl.int64) * BINS
        low, high, above = _bracketed(scores, minus, always, valid, counts, total, wanted, BLOCK, BINS, LINES * RUN)
    ties = wanted - above
    key = _mix(_mix(seed.to(tl.uint32) ^ _mix(site.to(tl.uint32))) + tl.load(clock).to(tl.uint32))
    key = _mix(key + (first + row).to(tl.uint32) * 0x9E3779B9)
    pace, length = _pace(drawn, free)
    # draws whose run of free columns may touch that of a line
    reach = tl.where(drawn > 0, 2 + (RUN * drawn.to(tl.int64) + free - 1) // tl.maximum(free, 1), 0).to(tl.int32)
    larger_before = 0
    ties_before = 0
    valid_before = 0
    for at in range(0, total, LINES * RUN):
        # a thread has a line of neighbouring columns: what is the same for all of them is computed once
        column = at + tl.arange(0, LINES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
        rank = _ranks(scores, minus, always, valid, column, total)
        larger = rank >= high
        tied = (rank >= low) & (rank < high)
        # [LINES] both counts in one sum: they stay below 2^16 in a block
        both = tl.sum(tl.where(larger, 65536, tied.to(tl.int32)), 1)
        before = tl.cumsum(both, 0) - both
        ties_to = ties_before + (before & 65535)
        taken_to = larger_before + (before >> 16) + tl.minimum(ties_to, ties)
        taken = larger | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= (ties - ties_to)[:, None]))
        others = (rank >= 0) & ~taken
        if valid is None:
            valid_to = tl.minimum(at + tl.arange(0, LINES) * RUN, total)
        else:
            present = tl.sum((rank >= 0).to(tl.int32), 1)
            valid_to = valid_before + tl.cumsum(present, 0) - present
            valid_before += tl.sum(present, 0)
        # the free columns of a line are numbered from free_to on; so are those drawn
        free_to = valid_to - taken_to
        number = free_to[:, None] + tl.cumsum(others.to(tl.int32), 1) - 1
        hit, draw_to = _drawn(number, free_to, drawn, reach, pace, length, key)
        chosen = taken | (hit & others)
        target = (taken_to + draw_to)[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        tl.store(lists + target, column, mask=chosen)
        counted = tl.sum(both, 0)
        larger_before += counted >> 16
        ties_before += counted & 65535
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
def _bracketed(
    scores, minus, always, valid, counts, total, wanted, SAMPLE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """As `_held`, for rows that do not fit a block: a sample gives a bracket, its histogram the threshold.

    counts [BINS] is scratch; a bracket of more ranks than that takes several readings of the row.
    """
    TOP: tl.constexpr = 1 << _bits(scores)
    bin_ = tl.arange(0, BINS)
    spread = (tl.arange(0, SAMPLE).to(tl.int64) * total // SAMPLE).to(tl.int32)
    rank = _ranks(scores, minus, always, valid, spread, total)
    share = wanted * (SAMPLE / total)
    slack = 3 * tl.sqrt(share) + 4
    low = _quantile(rank, tl.minimum(share + slack, SAMPLE).to(tl.int32), _bits(scores))
    high = _quantile(rank, tl.maximum(share - slack, 0).to(tl.int32), _bits(scores)) + 1
    above = 0
    searching = wanted > 0
    if wanted == 0:
        low = TOP - 1
        high = TOP
    while searching:
        shift = 0
        while ((high - low - 1) >> shift) >= BINS:
            shift += 1
        tl.store(counts + bin_, tl.zeros([BINS], tl.int32))
        tl.debug_barrier()
        beyond = tl.zeros([BLOCK], tl.int32)
        for at in range(0, total, BLOCK):
            rank = _ranks(scores, minus, always, valid, at + tl.arange(0, BLOCK), total)
            within = (rank >= low) & (rank < high)
            beyond += (rank >= high).to(tl.int32)
            tl.atomic_add(counts + tl.where(within, (rank - low) >> shift, 0), 1, mask=within, sem="relaxed")
        tl.debug_barrier()
        found = tl.load(counts + bin_, volatile=True)
        tl.debug_barrier()
        past = tl.sum(beyond, 0)
        # [BINS] how many ranks reach a bin or pass it
        at_least = past + tl.sum(found, 0) - tl.cumsum(found, 0) + found
        passed = tl.sum((at_least >= wanted).to(tl.int32), 0)
        if past >= wanted:
            low = high
            high = TOP
        elif passed == 0:
            high = low
            low = 0
        else:
            here = tl.sum(tl.where(bin_ == passed - 1, at_least, 0), 0)
            above = here - tl.sum(tl.where(bin_ == passed - 1, found, 0), 0)
            low = low + ((passed - 1) << shift)
            high = tl.minimum(high, low + (1 << shift))
            searching = (shift > 0) & (here != wanted)
            if here == wanted:  # all from here on are taken
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
def _pace(draws, free):
    """Draws for each free column, rounded down, and free columns for each draw, rounded up, both times 2^32."""
    free = free.to(tl.int64)
    draws = draws.to(tl.int64)
    return (draws << 32) // tl.maximum(free, 1), ((free << 32) + draws - 1) // tl.maximum(draws, 1)


@triton.jit
def _drawn(number, first, draws, reach, pace, length, key):
    """Which of the free columns `number` [LINES, RUN] are drawn, and how many are before each line.

    Draw d takes the column number floor(d length) + a hash below the length of this run. first [LINES]: a line's first
    number; the run that holds it is that of draw floor(first pace), or one of the next two.
    """
    draw = ((first.to(tl.int64) * pace) >> 32).to(tl.int32)
    before = tl.minimum(draw, draws)
    hit = number < -1
    for _ in range(reach):
        begin = ((draw.to(tl.int64) * length) >> 32).to(tl.int32)
        width = (((draw.to(tl.int64) + 1) * length) >> 32).to(tl.int32) - begin
        hashed = _mix(key + (draw + 1).to(tl.uint32) * 0x9E3779B9)
        taken = begin + ((hashed.to(tl.uint64) * width.to(tl.uint64)) >> 32).to(tl.int32)
        taken = tl.where(draw < draws, taken, 0x7FFFFFFF)
        before += (taken < first).to(tl.int32)
        hit = hit | (number == taken[:, None])
        draw += 1
    return hit, before


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain) of a uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
