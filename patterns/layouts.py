"""Which letters of two einsum equations stand for heads, rows, keys and widths of an attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Permutations of q, k and v to [B, H, tokens, width] (None: a dimension of size 1), and of [B, H, N, D] to the result.

    Where there is one batch letter, all heads are taken for those of one sample, and `out` leaves dimension 0 away.
    """

    q: tuple[int | None, ...]
    k: tuple[int | None, ...]
    v: tuple[int | None, ...]
    out: tuple[int, ...]


def layout_of(scores: str, mix: str) -> Layout | None:
    """Of the two einsum equations; None if they are no attention.

    >>> layout_of("bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd")
    Layout(q=(0, 2, 1, 3), k=(0, 2, 1, 3), v=(0, 2, 1, 3), out=(0, 2, 1, 3))
    >>> layout_of("hnd,hdm->hnm", "hnm,hmd->hnd")
    Layout(q=(None, 0, 1, 2), k=(None, 0, 2, 1), v=(None, 0, 1, 2), out=(1, 2, 3))
    """
    (qs, ks, ss), (ws, vs, os) = (_terms(e) for e in (scores, mix))
    if any(len(set(t)) != len(t) or len(t) != len(qs) for t in (qs, ks, ss, ws, vs, os)):
        return None
    batch = [letter for letter in ss if letter in qs and letter in ks]
    rows = [letter for letter in ss if letter in qs and letter not in ks]
    keys = [letter for letter in ss if letter in ks and letter not in qs]
    width = [letter for letter in qs if letter in ks and letter not in ss]
    if [len(x) for x in (batch, rows, keys, width)] != [len(qs) - 2, 1, 1, 1] or ss[-1] != keys[0]:
        return None
    # The second equation may use other letters: they are read off the weights' place by place.
    same = dict(zip(ws, ss, strict=True))
    vs, os = ([same.get(letter, f"{letter}'") for letter in term] for term in (vs, os))
    features = [letter for letter in vs if letter not in ss]
    wanted = [*batch, *rows, *features]
    if len(features) != 1 or sorted(vs) != sorted([*batch, *keys, *features]) or sorted(os) != sorted(wanted):
        return None
    absent = 4 - len(qs)
    return Layout(
        *(
            (*[None] * absent, *(term.index(x) for x in (*batch, *places)))
            for term, places in ((qs, rows + width), (ks, keys + width), (vs, keys + features))
        ),
        tuple(wanted.index(x) + absent for x in os),
    )


def equation(bound: Mapping[str, object], name: str, rank: int) -> str:
    """The einsum equation of a product; dots become letters."""
    heads = "ABCD"[: rank - 2]
    if bound[f"{name} by"] != "einsum":
        return f"{heads}ik,{heads}kj->{heads}ij"
    terms = _terms(str(bound[f"{name} equation"]))
    dots = "ABCD"[: rank - len(terms[0].replace("...", ""))]
    left, right, result = (term.replace("...", dots) for term in terms)
    return f"{left},{right}->{result}"


def _terms(equation: str) -> list[str]:
    left, _, right = equation.replace(" ", "").partition("->")
    terms = [*left.split(","), right]
    return terms if len(terms) == 3 else ["", "", ""]
