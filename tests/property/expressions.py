"""Modules made from the expressions of patterns: what an expression says is written down, op by op, as source text.

Alternatives, the order of arguments that commute, and ops that change nothing are chosen at random; a mutation changes one
thing on the way. A new name in an expression has to be given a meaning in `_Writer.variable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from chipmunk_fx.graph.language import (
    Among,
    Call,
    Each,
    Expression,
    Function,
    Literal,
    Named,
    OneOf,
    Range,
    Var,
    Where,
)
from chipmunk_fx.patterns import ALL
from chipmunk_fx.patterns.convolutions import CONVOLVED
from chipmunk_fx.patterns.linears import UNTRANSPOSED
from tests.property.source import Pen, Spelling

C, HIDDEN, ROWS, HEADS, WIDTH = 16, 24, 33, 2, 8  # WIDTH of a head
PATTERNS = [pattern for pattern in ALL if pattern is not CONVOLVED]  # which is laid out otherwise
REFUSED = ("foreign", *UNTRANSPOSED)  # ops of others, weights of other sizes
MATRICES_ONLY = ("mm", "addmm")  # tags of alternatives that take no batch
LITERALS = (
    None,
    -1,
    3,
    1,
    2,
    0,
    -2,
    0.5,
    -1e4,
    False,
    True,
    "tanh",
    "none",
    [1, 0],
    [0, 2, 1],
    [0, 1, 3, 2],
    [-1],
    [2],
    [-2],
)
EQUATIONS = {
    "scores equation": ("'bhnd,bhmd->bhnm'", "'...id,...jd->...ij'", "'bhid,bhjd->bhij'"),
    "mix equation": ("'bhnm,bhmd->bhnd'", "'bhnm,bhmd->bnhd'", "'...ij,...jd->...id'"),
}
MUTATIONS = ("* 1.5", "+ 0.1", "- 0.1", "flipped", "returned", "written to", "another literal", "another keyword")


@st.composite
def written(draw, odd: bool) -> Spelling:
    """x [B, 33, 16] -> what the anchor of one of the patterns yields; `odd` asks for a mutation."""
    pattern = PATTERNS[draw(st.integers(0, len(PATTERNS) - 1))]
    writer = _Writer(draw, pattern.kind, odd)
    result = writer.write(pattern.expression)
    writer.pen.line(f"return {', '.join([result, *writer.also])}")
    return writer.pen.spelling


def _holds(literal: Literal, value: Any) -> bool:
    try:
        return bool(literal.test(value))
    except TypeError:  # a test of lists is not asked of numbers
        return False


class _Writer:
    """Every method returns the text of a value."""

    def __init__(self, draw: Any, kind: str, odd: bool) -> None:
        self.pen = Pen(draw)
        self.mutation = self.pen.pick(*MUTATIONS) if odd else None
        self.countdown = draw(st.integers(0, 6)) if odd else -1  # values until the mutation
        self.folded = self.pen.chance(30)  # heads in the batch
        self.tags: dict[str, str] = {}  # alternatives chosen, by name
        self.known: dict[str, str] = {}  # variable -> text
        self.calls: dict[str, str] = {}  # text of a call -> the name of its result
        self.also: list[str] = []
        self.width, self.part, self.needed = C, False, False
        self.batch = self.pen.pick(1, 2)
        self.pen.input("x", f"torch.randn({self.batch}, {ROWS}, {C})")
        self.pen.layer("norm", f"nn.LayerNorm({C})")
        self.flat = kind == "mlp" and self.pen.chance(8)
        self.pen.let("h", f"self.norm(x){'.flatten(0, 1)' if self.flat else ''}")

    def write(self, expression: Expression) -> str:
        pen = self.pen
        if isinstance(expression, Var):
            if expression.name not in self.known:
                self.known[expression.name] = self.variable(expression.name)
            return self.known[expression.name]
        if isinstance(expression, Named):
            text = self.known[expression.name] = self.write(expression.expression)
            return text
        if isinstance(expression, Literal):
            return self.literal(expression)
        if isinstance(expression, OneOf):
            left_out = () if self.flat else MATRICES_ONLY
            tags = [tag for tag in expression.options if tag not in (*left_out, *REFUSED)]
            if "adapted" in tags and self.pen.chance(85):
                tags.remove("adapted")
            if "bmm" in tags:
                tags = [tag for tag in tags if ("bmm" in tag) == self.folded]
            tag = self.tags[expression.name] = pen.pick(*tags)
            return self.write(expression.options[tag])
        if isinstance(expression, Where):
            self.needed = True
            result = self.write(expression.expression)
            self.needed = False
            return result
        if isinstance(expression, Range):
            return self.range(expression)
        if isinstance(expression, Function):
            name = pen.pick(*expression.known)
            called = f"{expression.name.replace(' ', '_')}_{name}"
            pen.spelling.space[called] = expression.known[name]
            return self.value(f"{called}({self.write(expression.expression)})")
        if isinstance(expression, Among):
            return self.among(expression)
        if isinstance(expression, Each):
            return f"[{', '.join(self.write(part) for part in expression.expressions)}]"
        return self.call(expression)

    def call(self, expression: Call) -> str:
        op = self.pen.pick(*expression.ops)
        given = dict(expression.args)
        if expression.commutes and self.pen.chance(50):
            a, b = expression.commutes
            given[a], given[b] = given[b], given[a]
        arguments = []
        for argument in op._schema.arguments:
            wanted, default = given.get(argument.name), argument.default_value
            if argument.name == "dtype" and isinstance(wanted, Literal):
                text = "torch.float64" if self.pen.chance(20) else "torch.float32"
            elif argument.name in ("dim0", "dim1"):
                text = argument.name[-1]
            elif wanted is None or (
                isinstance(wanted, Literal) and argument.has_default_value() and _holds(wanted, default)
            ):
                text = self.keyword(argument, default)
                if text is None:
                    continue
            else:
                text = self.write(wanted)
            arguments.append(f"{argument.name}={text}" if argument.kwarg_only else text)
        self.width = HIDDEN * (1 + self.part) if str(op).endswith("linear.default") else self.width
        return self.value(f"torch.ops.{op}({', '.join(arguments)})" + self.output(expression))

    def output(self, expression: Call) -> str:
        return "" if expression.output is None else f"[{expression.output}]"

    def keyword(self, argument: Any, default: Any) -> str | None:
        """An argument that the pattern does not name: left out, or something else than its default."""
        others = {"alpha": "2", "beta": "0.5", "approximate": "'tanh'"}
        if argument.name in others and self.mutates("another keyword"):
            return others[argument.name]
        return None if argument.kwarg_only or argument.has_default_value() else repr(default)

    def range(self, expression: Range) -> str:
        before, self.part = self.part, self.pen.chance(60)
        part, whole = self.part, self.write(expression.expression)
        self.part, self.width = before, HIDDEN
        if not part:
            return whole
        start, stop = self.pen.pick((0, HIDDEN), (HIDDEN, 2 * HIDDEN), (8, 8 + HIDDEN))
        lists = f"{whole}.{self.pen.pick('chunk(2, -1)', f'split({HIDDEN}, -1)', f'unflatten(-1, (2, {HIDDEN})).unbind(-2)')}"
        return self.value(
            f"{lists}[{start > 0:d}]" if start != 8 and self.pen.chance(60) else f"{whole}[..., {start}:{stop}]"
        )

    def among(self, expression: Among) -> str:
        part, width = self.write(expression.expression), self.width
        side = self.value("h.abs()")
        order = self.pen.pick((side, part), (part, side), (side, side, part), (side, part, side))
        self.width = sum(width if text == part else C for text in order)
        return f"[{', '.join(order)}]"

    def literal(self, expression: Literal) -> str:
        fits = [value for value in LITERALS if _holds(expression, value)]
        fits = [value for value in fits if type(value) is type(fits[0])]
        others = [value for value in LITERALS if value not in fits and type(value) is type(fits[0])]
        return repr(self.pen.pick(*(others if others and self.mutates("another literal") else fits)))

    def mutates(self, mutation: str) -> bool:
        """Whether the one mutation is due, and of this kind."""
        if self.mutation != mutation or self.countdown > 2:
            return False
        self.mutation = None
        return True

    def value(self, text: str) -> str:
        """The name of a value; the same call is not always made twice."""
        if text in self.calls and self.pen.chance(80):
            return self.calls[text]
        name = self.calls[text] = self.pen.let(f"t{len(self.pen.spelling.lines)}", text)
        self.countdown -= 1
        if self.countdown == 0 and self.mutation:
            kind, self.mutation = self.mutation, None
            if kind[0] in "*+-":
                return self.pen.let(f"{name}m", f"{name} {kind}")
            if kind == "flipped":
                return self.pen.let(f"{name}m", f"{name}.flip({self.pen.pick(-1, 1)})")
            if kind == "written to":
                self.pen.line(f"{name}.{self.pen.pick('mul_(2)', 'add_(1)')}")
            self.also += [name] if kind == "returned" else []
        return name

    def variable(self, name: str) -> str:
        """What a name of an expression stands for."""
        optional = "None" if not self.needed and self.pen.chance(40) else ""
        rows = HIDDEN * (1 + self.part)
        matrices: dict[str, Sequence[int]] = {
            "w1": (rows, C),
            "wu": (rows, C),
            "w2": (C, self.width),
        }
        if name == "x":
            return "h"
        if name.endswith(" equation"):
            return self.pen.pick(*EQUATIONS[name])
        if name == "added":
            return self.pen.pick(
                *(f"torch.{kind}({HEADS * self.batch}, {ROWS}, {ROWS})" for kind in ("zeros", "empty", "ones"))
            )
        if name.endswith(" update"):  # of low rank
            return f"({self.pen.linear('up', 4, rows, False)}({self.pen.linear('down', C, 4, False)}(h)) * 0.5)"
        if name in matrices:
            rows, columns = matrices[name]
            return self.pen.layer(name.replace(" ", "_"), f"nn.Parameter(torch.randn({rows}, {columns}) / 8)")
        if name in ("b1", "bu", "b2"):
            size = C if name == "b2" else rows
            return optional or self.pen.layer(name, f"nn.Parameter(torch.randn({size}))")
        if name in ("q", "k", "v"):
            heads = self.pen.pick(
                f".unflatten(-1, ({HEADS}, {WIDTH})).transpose(1, 2)", f".view(-1, {ROWS}, 2, 8).movedim(1, 2)"
            )
            by = self.tags.get("scores by")
            if by and self.folded:
                heads += ".flatten(0, 1)"
            turned = ".mT" if name == "k" and by not in (None, "einsum") else ""
            return self.pen.let(name, f"{self.pen.linear(name, C, C)}(h){heads}{turned}")
        if name == "mask":
            lengths = f"torch.arange({ROWS}) < torch.tensor([{ROWS - 6}, 20])[:{self.batch}, None]"
            return optional or f"{self.pen.layer('mask', f'nn.Buffer({lengths})')}[:, None, None, :]"
        constants = {
            **{
                "dim": ("-1", "2", "-1", "2", "-1", "1"),
                "dropout": (*["0.0"] * 8, "0.2"),
                "causal": (*["False"] * 8, "True"),
            },
            **{
                "scale": ("None", "0.5"),
                "grouped": ("False",),
                "factor": ("0.35", "2", "0.5", "1.5", "0.35", "2", "h.mean()", "self.norm.weight[0]"),
            },
            "softmax dtype": ("None", "None", "torch.float32", "torch.float64"),
            **{"maximum dim": ("-1", "-1", "-1", "-2"), "maximum keepdim": ("True", "True", "False")},
            **{"kept": ("True", "True", "False"), "sum dtype": ("None", "None", "torch.float64")},
            **{"beta": ("0", "0", "1"), "alpha": ("1", "0.35")},
        }
        if name not in constants:
            raise NotImplementedError(f"say in tests/property/expressions.py what {name!r} stands for in a pattern")
        return self.pen.pick(*constants[name])
