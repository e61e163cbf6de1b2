"""What an MLP reads: the tokens of a block, or one vector a sample that conditions them."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from chipmunk_fx.graph.walk import PROJECTIONS, ancestors, rank, shape

aten = torch.ops.aten

_FOLDS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)
_PICKS = (aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.masked_select.default)
_ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int)
_SWAPS = (aten.transpose.int, aten.permute.default, aten.movedim.int)


def stream_refusal(x: fx.Node) -> str | None:
    """Why `x` holds no rows of tokens that could share a list.

    None for [batch, ..., tokens, width], [tokens, batch, width] and [rows, width] with the tokens of one or of all samples.
    """
    if rank(x) >= 3 and _rows(x, 1) == 1 and not _tokens_first(x):
        return f"input {_sizes(x)} has one row a sample: a conditioning vector, or no tokens to group"
    if rank(x) >= 3 or _folded(x) or _attended(x):
        return None
    source = _source(x)
    if source.target in _PICKS and not _one_a_sample(source):
        return (
            f"input {_sizes(x)} has rows that {source} picks out of a sequence (a routed expert): others at every step"
        )
    other = " or rows of a sequence that this graph does not show" if source.op == "placeholder" else ""
    return f"input {_sizes(x)} is a conditioning vector{other}; [batch, ..., tokens, width] is supported"


def _source(x: fx.Node) -> fx.Node:
    """Back along first arguments from x [rows, width] to rows that are picked, a sequence, a projection or an input."""
    ends = (*_PICKS, *PROJECTIONS)
    while rank(x) < 3 and x.target not in ends and x.args and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _one_a_sample(picked: fx.Node) -> bool:
    """Whether [batch, width] was picked of [batch, tokens, width], as the last token of a text is."""
    given = picked.all_input_nodes[0]
    return rank(given) >= 3 and _hints(given)[0] == _hints(picked)[0]


def _folded(x: fx.Node) -> bool:
    """Whether the rows of x [rows, width] are tokens: a [batch, tokens, width] with more than one token became them."""
    behind = _alike(x) if rank(x) == 2 and _rows(x) is not None else []
    sources = [n.args[0] for n in behind if n.target in _FOLDS]
    return any(
        isinstance(n, fx.Node) and rank(n) >= 3 and shape(n)[-1] == shape(x)[-1] and _rows(n, 1) != 1 for n in sources
    )


def _attended(x: fx.Node) -> bool:
    """Whether the rows of x [rows, width] are the tokens of one sample: an attention behind it has as many rows."""
    rows = _rows(x) if rank(x) == 2 else None
    behind = ancestors(x, lambda n: n.target in _ATTENTION) if rows not in (None, 1) else []
    return any(n.target in _ATTENTION and rank(n) >= 3 and _rows_attending(n) == rows for n in behind)


def _rows_attending(attention: fx.Node) -> int | None:
    """Of [1, heads, rows, width] or [heads, rows, keys]; None where there are several samples."""
    *batch, _, rows, _ = _hints(attention)
    return rows if batch in ([], [1]) else None


def _tokens_first(x: fx.Node) -> bool:
    """Whether x [tokens, 1, width] was [1, tokens, width] before."""
    sources = [n.args[0] for n in _alike(x) if n.target in _SWAPS] if rank(x) == 3 else []
    first, second, width = _hints(x) if sources else (None, None, None)
    return any(isinstance(n, fx.Node) and _hints(n) == (second, first, width) for n in sources)


def _alike(x: fx.Node) -> list[fx.Node]:
    """What `x` comes of by way of values with as many dimensions and rows."""

    def other(node: fx.Node) -> bool:
        return rank(node) != rank(x) or _rows(node) != _rows(x)

    return [node for node in ancestors(x, other) if not other(node)]


def _rows(node: fx.Node, first: int = 0) -> int | None:
    """Product of the sizes from dimension `first` on, without the last; None if one is not known."""
    sizes = _hints(node)[first:-1]
    return None if None in sizes else prod(s for s in sizes if s is not None)


def _hints(node: fx.Node) -> tuple[int | None, ...]:
    """Sizes seen while compiling, None for one that depends on the data."""
    return tuple(s if isinstance(s, int) else s.node.hint if s.node.has_hint() else None for s in shape(node))


def _sizes(node: fx.Node) -> str:
    return "x".join(str(size) for size in shape(node))
