"""Which columns a group computes, on the device and without a synchronisation: the rules of chipmunk_fx.ops.selection.

One program a row of scores. Scores are not negative, so that their bits order like them. Short rows are held at once; of
long ones a sample brackets the threshold, and a histogram of the bracket tells it. One more pass writes the columns taken and
drawn in ascending order, each at the place that running sums give it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import seeds
from chipmunk_fx.kernels.triton.tuning import padded

WHOLE = 16384  # scores of a row that one program holds
HELD_A_WARP = 1024  # of them, where it does
SAMPLE = 2048  # scores of a longer one that the bracket comes from
LONG_WARPS = 8  # of a program for such a row
PARTS = 4  # of a thread's line of columns in the last pass, VECTOR each
VECTOR = tl.constexpr(4)  # int32 that one instruction writes: what layouts are chosen by
BINS = 1024  # of a histogram: at 2^-10 of an octave a code, a bracket rarely spans more
RANK_BITS = tl.constexpr(30)  # of fp32 scores; codes have 16
RANK_TOP = tl.constexpr((1 << 30) - 1)
LEAST_EXPONENT = tl.constexpr(72)  # biased, of the smallest code: 2^-55, the largest is below 2^9


def select(
    lists: Tensor, scores: Tensor, minus: Tensor | None, clock: Tensor, *, drawn: int, seed: int, site: int,
    first: int = 0, always: Tensor | None = None, valid: Tensor | None = None, spare: Tensor | None = None,
    rows_a_batch: int = 1, renewed: bool = False,
) -> None:  # fmt: skip
    """Write lists int32 [rows, K] from scores [rows, M], or from |scores - minus|; contiguous, or rows of scores apart.

    scores: fp32, or uint16 as `coded` makes them (without minus). clock int64 [2] on the device: the step feeds the draws;
    renewed: leave lists alone where clock[1] is 0. first: index of the first row of this call; always bool [1 or groups, M],
    valid bool [B, M], rows_a_batch: rows of each batch entry. M fills places left: where too few columns are valid, and those
    that spare int32 [1 or B, 1 or groups] counts.
    """
    (rows, columns), total = lists.shape, scores.shape[1]
    whole = total <= WHOLE
    block = padded(total, 128) if whole else SAMPLE
    warps = min(max(block // HELD_A_WARP, 4), 16) if whole else LONG_WARPS
    counts = None if whole else torch.empty(rows, BINS, dtype=torch.int32, device=scores.device)
    _select[(rows,)](
        lists, scores, minus, always, valid, spare, clock, counts, columns, total, scores.stride(0), drawn,
        *seeds(seed, site), first, rows_a_batch, 1 if always is None else len(always), 1 if spare is None else len(spare),
        RENEWED=renewed, WHOLE=whole, BLOCK=block, BINS=BINS, LINES=32 * warps, PARTS=PARTS, num_warps=warps,
    )  # fmt: skip


@triton.jit
def coded(mass):
    """uint16 of the order of fp32 scores from 2^-55 to 2^9, 1024 to an octave: what is closer counts as equal."""
    code = (mass.to(tl.int32, bitcast=True) >> 13) - (LEAST_EXPONENT << 10)
    return tl.minimum(tl.maximum(code, 0), 65534).to(tl.uint16)


@triton.jit(do_not_specialize=["seed", "site", "first"])
def _select(
    lists, scores, minus, always, valid, spare, clock, counts, columns, total, pitch, drawn, seed, site, first,
    rows_a_batch, always_rows, spare_rows, RENEWED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    LINES: tl.constexpr, PARTS: tl.constexpr,
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
    wanted = columns - drawn
    if spare is not None:
        entry = (first + row) // rows_a_batch % spare_rows
        wanted -= tl.load(spare + entry * always_rows + (first + row) % always_rows)
    wanted = tl.maximum(tl.minimum(wanted, eligible), 0)
    spent = drawn >= eligible - wanted  # all others would be drawn
    wanted = tl.where(spent, eligible, wanted)
    drawn = tl.where(spent, 0, drawn)
    free = eligible - wanted

    if WHOLE:
        low, high, above = _held(scores, minus, always, valid, total, wanted, BLOCK)
    else:
        counts += row.to(tl.int64) * BINS
        low, high, above = _bracketed(scores, minus, always, valid, counts, total, wanted, BLOCK, BINS, LINES, PARTS)
    ties = wanted - above
    key = _mix(_mix(seed.to(tl.uint32) ^ _mix(site.to(tl.uint32))) + tl.load(clock).to(tl.uint32))
    key = _mix(key + (first + row).to(tl.uint32) * 0x9E3779B9)
    pace, length = _pace(drawn, free)
    RUN: tl.constexpr = PARTS * VECTOR
    # draws whose run of free columns may touch a line
    reach = tl.where(drawn > 0, 2 + (RUN * drawn.to(tl.int64) + free - 1) // tl.maximum(free, 1), 0).to(tl.int32)
    larger_before = 0
    ties_before = 0
    valid_before = 0
    line = tl.arange(0, LINES)
    for at in range(0, total, LINES * RUN):
        # a thread has a line of neighbouring columns: what is the same for all of them is computed once
        both = tl.zeros([LINES], tl.int32)
        present = tl.zeros([LINES], tl.int32)
        for part in tl.static_range(PARTS):
            rank = _ranks(scores, minus, always, valid, _columns(at, part, LINES, RUN), total)
            # how many are larger and how many equal in one sum: they stay below 2^16 in a block
            both += tl.sum(tl.where(rank >= high, 65536, (rank >= low).to(tl.int32)), 1)
            if valid is not None:
                present += tl.sum((rank >= 0).to(tl.int32), 1)
        before = tl.cumsum(both, 0) - both
        ties_to = ties_before + (before & 65535)
        taken_to = larger_before + (before >> 16) + tl.minimum(ties_to, ties)
        valid_to = tl.minimum(at + line * RUN, total)
        if valid is not None:
            valid_to = valid_before + tl.cumsum(present, 0) - present
            valid_before += tl.sum(present, 0)
        drawn_here, draw_to = _drawn(valid_to - taken_to, drawn, reach, pace, length, key, RUN)
        place = taken_to + draw_to
        counted = tl.sum(both, 0)
        ties_after = ties_before + (counted & 65535)
        if (ties_before < ties) & (ties_after > ties):
            _write(
                lists, scores, minus, always, valid, at, total, low, high, ties - ties_to, place, drawn_here, True,
                LINES, PARTS,
            )  # fmt: skip
        else:
            # all of a block's ties are taken or none
            least = tl.where(ties_after <= ties, low, high)
            _write(
                lists, scores, minus, always, valid, at, total, least, high, None, place, drawn_here, False,
                LINES, PARTS,
            )  # fmt: skip
        larger_before += counted >> 16
        ties_before = ties_after
    for at in range(wanted + drawn, columns, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(lists + place, tl.zeros([BLOCK], tl.int32) + total, mask=place < columns)


@triton.jit
def _write(
    lists, scores, minus, always, valid, at, total, low, high, ties, place, drawn, MIXED: tl.constexpr,
    LINES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the columns of lines taken and drawn to `place` [LINES] and on: those from `high` on and of [low, high) the
    first `ties` [LINES] where MIXED, or those from `low` on. drawn [LINES]: a bit for each free column of a line."""
    others = tl.zeros([LINES], tl.int32) - 1
    place -= 1
    for part in tl.static_range(PARTS):
        column = _columns(at, part, LINES, PARTS * VECTOR)
        rank = _ranks(scores, minus, always, valid, column, total)
        taken = rank >= low
        if MIXED:
            tied = (taken & (rank < high)).to(tl.int32)
            taken = (rank >= high) | ((tied > 0) & (tl.cumsum(tied, 1) <= ties[:, None]))
            ties -= tl.sum(tied, 1)
        other = ((rank >= 0) & ~taken).to(tl.int32)
        number = tl.maximum(others[:, None] + tl.cumsum(other, 1), 0)
        chosen = taken.to(tl.int32) | (other & (drawn[:, None] >> number))
        target = lists + place[:, None] + tl.cumsum(chosen, 1)
        # said for the layout alone, which is then that of the scores; the mask keeps each store apart
        target = tl.max_contiguous(tl.multiple_of(target, [1, 16]), [1, VECTOR])
        tl.store(target, column, mask=chosen > 0)
        others += tl.sum(other, 1)
        place += tl.sum(chosen, 1)


@triton.jit
def _columns(at, part, LINES: tl.constexpr, RUN: tl.constexpr):
    """[LINES, VECTOR]: one part of each line of RUN columns from `at` on."""
    return at + part * VECTOR + tl.arange(0, LINES)[:, None] * RUN + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _ranks(scores, minus, always, valid, column, total):
    """Scores as integers of the same order; the largest for columns that are always on, -1 for those that may not be taken.

    total: columns from there on are not; None: there are none.
    """
    inside = None
    if total is not None:
        inside = column < total
    if scores.dtype.element_ty == tl.uint16:
        top = 65535
        rank = _load(scores + column, inside).to(tl.int32)
    else:
        top = RANK_TOP
        score = _load(scores + column, inside)
        if minus is not None:
            score = tl.abs(score - _load(minus + column, inside))
        # a NaN may have either sign, and must not outrank what is always on
        rank = tl.minimum(tl.maximum(score.to(tl.int32, bitcast=True) >> 1, 0), top - 1)
    if always is not None:
        rank = tl.where(_load(always + column, inside) != 0, top, rank)
    if valid is not None:
        rank = tl.where(_load(valid + column, inside) != 0, rank, -1)
    return rank if inside is None else tl.where(inside, rank, -1)


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)


@triton.jit
def _held(scores, minus, always, valid, total, wanted, BLOCK: tl.constexpr):
    """low, high and the number of ranks >= high, such that taking these and the first of [low, high) gives those wanted."""
    rank = _ranks(scores, minus, always, valid, tl.arange(0, BLOCK), total)
    low = _quantile(rank, wanted, _bits(scores))
    return low, low + 1, tl.sum((rank > low).to(tl.int32), 0)


@triton.jit
def _bracketed(
    scores, minus, always, valid, counts, total, wanted, SAMPLE: tl.constexpr, BINS: tl.constexpr, LINES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """As `_held`, for rows that do not fit a block: a sample gives a bracket, its histogram the threshold.

    counts [BINS] is scratch; a bracket of more ranks than that takes several readings of the row.
    """
    TOP: tl.constexpr = 1 << _bits(scores)
    bin_ = tl.arange(0, BINS)
    spread = (tl.arange(0, SAMPLE).to(tl.int64) * total // SAMPLE).to(tl.int32)
    sample = _ranks(scores, minus, always, valid, spread, total)
    share = wanted * (SAMPLE / total)
    slack = 3 * tl.sqrt(share) + 4
    low = _quantile(sample, tl.minimum(share + slack, SAMPLE).to(tl.int32), _bits(scores))
    high = _quantile(sample, tl.maximum(share - slack, 0).to(tl.int32), _bits(scores)) + 1
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
        beyond = tl.zeros([LINES], tl.int32)
        whole = total - total % (LINES * PARTS * VECTOR)
        for at in range(0, whole, LINES * PARTS * VECTOR):
            for part in tl.static_range(PARTS * VECTOR):
                column = at + part * LINES + tl.arange(0, LINES)
                beyond += _tallied(scores, minus, always, valid, counts, column, None, low, high, shift)
        for at in range(whole, total, LINES):
            beyond += _tallied(scores, minus, always, valid, counts, at + tl.arange(0, LINES), total, low, high, shift)
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
def _tallied(scores, minus, always, valid, counts, column, total, low, high, shift):
    """Which ranks are `high` or more, as 0 or 1; those of [low, high) are counted in `counts`. A thread has one column."""
    rank = _ranks(scores, minus, always, valid, column, total)
    within = (rank >= low) & (rank < high)
    tl.atomic_add(counts + ((rank - low) >> shift), 1, mask=within, sem="relaxed")
    return (rank >= high).to(tl.int32)


@triton.jit
def _quantile(rank, wanted, BITS: tl.constexpr):
    """A number of BITS bits that `wanted` of the ranks reach: just so many, or the largest that more do; 0 where fewer do."""
    low, step = 0, 1 << (BITS - 1)
    while step > 0:
        reached = tl.sum((rank >= low + step).to(tl.int32), 0)
        low += tl.where(reached >= wanted, step, 0)
        step = tl.where(reached == wanted, 0, step >> 1)
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
def _drawn(first, draws, reach, pace, length, key, RUN: tl.constexpr):
    """Which of the RUN free columns from number `first` [LINES] on are drawn, a bit each, and how many are before.

    Draw d takes the column number floor(d length) + a hash below the length of this run. The run that holds `first` is that of
    draw floor(first pace), or the next one.
    """
    draw = ((first.to(tl.int64) * pace) >> 32).to(tl.int32)
    before = tl.minimum(draw, draws)
    bits = tl.zeros_like(first)
    begin = ((draw.to(tl.int64) * length) >> 32).to(tl.int32)
    for _ in range(reach):
        hashed = _mix(key + (draw + 1).to(tl.uint32) * 0x9E3779B9)
        draw += 1
        end = ((draw.to(tl.int64) * length) >> 32).to(tl.int32)
        ahead = begin + tl.umulhi(hashed, (end - begin).to(tl.uint32)).to(tl.int32) - first
        there = draw <= draws
        before += (there & (ahead < 0)).to(tl.int32)
        inside = there & (ahead >= 0) & (ahead < RUN)
        bits |= tl.where(inside, 1 << tl.where(inside, ahead, 0), 0)
        begin = end
    return bits, before


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain) of a uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
