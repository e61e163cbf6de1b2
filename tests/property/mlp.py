"""Spellings of feed-forward blocks as people write them, and what is one step away from them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.property.source import Pen, Spelling

C, HIDDEN = 16, 24

USUAL = ("F.gelu({})", "F.gelu({}, approximate='tanh')", "F.silu({})", "F.relu({})", "F.relu({}) ** 2")
UNUSUAL = (
    "F.relu({}).pow(2)",
    "F.relu({}).square()",
    "{0} * torch.sigmoid({0})",
    "{0} * torch.sigmoid(1.702 * {0})",
    "0.5 * {0} * (1 + torch.tanh(0.7978845608 * ({0} + 0.044715 * {0} ** 3)))",
    "0.5 * {0} * (1 + torch.erf({0} / 2**0.5))",
    "F.mish({})",
    "F.elu({})",
    "F.leaky_relu({}, 0.2)",
    "{}.tanh()",
    "F.silu({}.float()).to(torch.float32)",
    "F.silu({}.double()).float()",
    "F.relu({}) ** 3",
    "F.gelu({}) * 1.5",
    "F.gelu({} + 0.1)",
    "F.gelu({0}) + {0}",
    "{}",
)
ODD = (
    "dropped",
    "hidden values returned",
    "hidden values used elsewhere",
    "first product used elsewhere",
    "hidden values written to",
    "first product written to",
    "input written to",
    "one weight for both",
    "one layer for both",
    "called twice",
    "over tokens",
    "softmax",
    "scaled by token",
    "scaled by neuron",
    "normalised",
    "masked by another stream",
    "low-rank addition",
    "scaled weight",
)


@st.composite
def mlp(draw, odd: bool) -> Spelling:
    """x [B, N, 16], or a grid of tokens [B, h, w, 16], -> [B, N, 16]; `odd` asks for a mutation."""
    pen = Pen(draw)
    name = pen.pick(*ODD) if odd else ""
    shape = pen.pick(f"1, 33, {C}", f"2, 32, {C}", f"1, 4, 9, {C}", f"33, 2, {C}") if pen.chance(95) else f"40, {C}"
    pen.input("x", f"torch.randn({shape})")
    pen.layer("norm", f"nn.LayerNorm({C})")
    pen.let("h", "self.norm(x)" if pen.chance(90) else "x")
    form = (
        pen.pick("plain", "gated", "halves", "parallel", "plain")
        if not odd
        else pen.pick("plain", "plain", "gated", "halves")
    )
    if name in ("one weight for both", "one layer for both"):
        form = "plain"
    start = len(pen.spelling.lines)
    inner = _hidden(pen, form, name)
    _down(pen, inner, name)
    if name == "called twice":
        body = pen.spelling.lines[start:]
        pen.spelling.lines += ["h = self.norm(o)", *body]
    if pen.chance(50):
        pen.line(f"o = {pen.pick('x + o', 'o * 0.5 + h')}")
    pen.line(f"return {'o, a' if name == 'hidden values returned' else 'o'}")
    return pen.spelling


def _hidden(pen: Pen, form: str, odd: str) -> int:
    """Hidden values a, from h; returns how many."""
    width = C if odd in ("one weight for both", "one layer for both") else HIDDEN
    if form == "halves":
        pen.let("u", _first(pen, "fc1", 2 * width, odd))
        _between(pen, odd)
        gate, value = pen.pick(("g", "u"), ("u", "g"))
        parts = f"{gate}, {value}"
        how = pen.pick("chunk", "split", "slices", "chunk", "unflatten", "interleaved", "overlapping")
        split = {
            "chunk": f"{parts} = u.chunk(2, dim=-1)",
            "split": f"{parts} = u.split({width}, -1)",
            "slices": f"{parts} = u[..., :{width}], u[..., {width}:]",
            "unflatten": f"{parts} = u.unflatten(-1, (2, {width})).unbind(-2)",
            "interleaved": f"{parts} = u[..., ::2], u[..., 1::2]",
            "overlapping": f"{parts} = u[..., :{width}], u[..., {width - 8}:{2 * width - 8}]",
        }
        pen.line(split[how])
        pen.let("a", f"{_activated(pen, 'g')} * u" if pen.chance(50) else f"u * {_activated(pen, 'g')}")
    elif form == "gated":
        pen.let("g", _first(pen, "gate", width, odd))
        other = pen.pick("h.flip(0)", "(h * 2)") if pen.chance(15) else "h"
        pen.let("u", f"{pen.linear('up', C, width)}({other})")
        _between(pen, odd)
        pen.let("a", f"{_activated(pen, 'g')} * u" if pen.chance(50) else f"u * {_activated(pen, 'g')}")
        if pen.chance(10):
            pen.line(f"a = {_activated(pen, 'a')}")
    elif form == "parallel":
        side = pen.pick(8, 16)
        if pen.chance(30):  # one linear for both
            pen.let("f", f"{pen.linear('fc1', C, width + side)}(h)")
            pen.line(pen.pick(f"s, u = f.split([{side}, {width}], -1)", f"s, u = f[..., :{side}], f[..., {side}:]"))
        else:
            pen.let("u", _first(pen, "fc1", width, odd))
            pen.let("s", f"{pen.linear('side', C, side)}(h)")
        pen.let("a", _activated(pen, "u"))
        order = pen.pick("s.abs(), a", "a, s.abs()", "s.abs(), s, a", "s.abs(), a", "s, a, s.neg()", "a, a")
        pen.let("a", f"torch.cat([{order}], dim={pen.pick(-1, -1, -1, 'a.dim() - 1')})")
        return sum(width if part == "a" else side for part in order.split(", "))
    else:
        pen.let("u", _first(pen, "fc1", width, odd))
        _between(pen, odd)
        pen.let("a", _activated(pen, "u"))
    if pen.chance(8):
        pen.line("a = F.dropout(a, 0.1, self.training)")
    return width


def _first(pen: Pen, name: str, width: int, odd: str) -> str:
    if odd == "low-rank addition":
        down, up = pen.linear("lora_a", C, 4, False), pen.linear("lora_b", 4, width, False)
        return f"{pen.linear(name, C, width)}(h) + 0.5 * {up}({down}(h))"
    if odd == "scaled weight":
        weight = pen.layer("weight", f"nn.Parameter(torch.randn({width}, {C}) / 12)")
        return f"F.linear(h, {weight} * {pen.layer('step', f'nn.Parameter(torch.rand({width}, 1))')})"
    if odd == "one weight for both":
        pen.layer("weight", f"nn.Parameter(torch.randn({width}, {C}) / 12)")
        return "F.linear(h, self.weight)"
    if pen.chance(15):
        weight = pen.layer("weight", f"nn.Parameter(torch.randn({width}, {C}) / 12)")
        bias = pen.layer("bias", f"nn.Parameter(torch.randn({width}))")
        return pen.pick(
            f"F.linear(h, {weight}, {bias})", f"h @ {weight}.mT + {bias}", f"F.linear(h, {weight}) + {bias}"
        )
    return f"{pen.linear(name, C, width)}(h)"


def _between(pen: Pen, odd: str) -> None:
    """What may happen to the first product u."""
    lines = {
        "first product used elsewhere": "extra = u.mean(-1, keepdim=True)",
        "first product written to": pen.pick("u.mul_(0.5)", "u += 1", "u[..., 0] = 0"),
        "over tokens": f"u = u.{pen.pick('flip(0)', 'cumsum(1)', 'roll(1, 1)', 'sort(-1).values')}",
        "scaled by token": "u = u * h.mean(-1, keepdim=True)",
        "scaled by neuron": f"u = u * {pen.layer('per', 'nn.Parameter(torch.rand(1))') if odd == 'scaled by neuron' else ''}",
        "normalised": "u = F.layer_norm(u, u.shape[-1:])",
        "masked by another stream": "u = u.masked_fill(h.mean(-1, keepdim=True) > 0, 0.0)",
    }
    if odd in lines:
        pen.line(lines[odd])


def _activated(pen: Pen, name: str) -> str:
    return pen.pick(*(UNUSUAL if pen.chance(25) else USUAL)).format(name)


def _down(pen: Pen, inner: int, odd: str) -> None:
    """The second linear, from a to o."""
    lines = {
        "dropped": "a = F.dropout(a, 0.3, training=True)",
        "hidden values used elsewhere": "extra = a.amax(-1, keepdim=True)",
        "hidden values written to": pen.pick("a.mul_(2)", "a[..., 0] = 1"),
        "input written to": "h.mul_(2)",
        "softmax": "a = a.softmax(-1)",
    }
    if odd in lines:
        pen.line(lines[odd])
    if odd == "one weight for both":
        pen.line("o = F.linear(a, self.weight)")
    elif odd == "one layer for both" and "fc1" in pen.spelling.layers:
        pen.line("o = self.fc1(a)")
    elif pen.chance(10):
        weight = pen.layer("last", f"nn.Parameter(torch.randn({C}, {inner}) / 12)")
        pen.let(
            "o", pen.pick(f"F.linear(a, {weight})", f"a @ {weight}.mT", f"torch.einsum('...f,cf->...c', a, {weight})")
        )
    else:
        pen.let("o", f"{pen.linear('down', inner, C)}(a)")
    if odd in ("hidden values used elsewhere", "first product used elsewhere"):
        pen.line("o = o + extra")
