"""Spellings of attention as people write it, and what is one step away from them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.property.source import Pen, Spelling

HEADS, WIDTH = 2, 8  # of a head
C = HEADS * WIDTH
OTHER = 11  # tokens of the second stream

# One step away from attention: what is odd about each is left dense, or computed as it is written.
ODD = (
    "softmax over queries",
    "softmax over heads",
    "scale in the graph",
    "learnt scale",
    "weights dropped",
    "weights used elsewhere",
    "weights returned",
    "scores used elsewhere",
    "scores written to",
    "weights written to",
    "values written to",
    "keys written to",
    "stream written to",
    "keys and values swapped",
    "keys of another order",
    "weights squared",
    "no softmax",
    "sharpened after",
)


@st.composite
def attention(draw, odd: bool) -> Spelling:
    """x [B, N, 16] (and a second stream y) -> [B, N, 16]; `odd` asks for a mutation."""
    pen = Pen(draw)
    name = pen.pick(*ODD) if odd else ""
    batch, rows = pen.pick(1, 2), pen.pick(32, 40, 17)
    kind = (
        "self"
        if odd and pen.chance(80)
        else pen.pick("self", "self", "self", "joint", "joint", "image queries", "cross")
    )
    pen.input("x", f"torch.randn({batch}, {rows}, {C})")
    pen.layer("norm", f"nn.LayerNorm({C})")
    pen.let("h", "self.norm(x)")
    writes_stream = name == "stream written to"
    columns = _project(pen, kind, rows, batch, writes_stream)
    rows = columns if kind == "joint" else rows
    if name == "keys and values swapped":
        pen.line("k, v = v, k")
    if name == "keys of another order":
        pen.line(f"k = k.{pen.pick('flip(2)', 'roll(1, 2)', 'flip(1)')}")
    _position(pen, rows, columns)
    form = pen.pick("matmul", "bmm", "einsum", "baddbmm")
    if not odd or name in ("keys and values swapped", "keys of another order", "stream written to"):
        form = pen.pick("sdpa", "sdpa", form)
    if name == "weights dropped" and pen.chance(50):
        form = "sdpa"
    if form == "sdpa":
        _fused(pen, batch, rows, columns, name == "weights dropped")
    else:
        _written_out(pen, form, batch, rows, columns, name)
    merge = pen.pick(".transpose(1, 2).flatten(2)", f".permute(0, 2, 1, 3).reshape({batch}, {rows}, {C})")
    pen.let("o", f"o{merge}")
    if pen.chance(70):
        pen.let("o", f"{pen.linear('out', C, C)}(o)")
    if pen.chance(50) and kind != "joint":
        pen.line("o = x + o")
    pen.line(f"return {'o, w' if name == 'weights returned' else 'o'}")
    return pen.spelling


def _project(pen: Pen, kind: str, rows: int, batch: int, written: bool) -> int:
    """q [B, 2, N, 8], k and v [B, 2, M, 8]; returns M."""
    if kind == "self":
        _self_projection(pen, rows, batch, written)
        return rows
    pen.input("y", f"torch.randn({batch}, {OTHER}, {C})")
    if kind == "cross":
        pen.let("q", f"{pen.linear('q', C, C)}(h){_heads(pen, batch, rows)}")
        for name in "kv":
            pen.let(name, f"{pen.linear(name, C, C)}(y){_heads(pen, batch, OTHER)}")
        return OTHER
    both = "torch.cat([y, h], 1)" if pen.chance(50) else "torch.cat([h, y], dim=1)"
    first = both.endswith("[y, h], 1)")
    total = rows + OTHER
    if pen.chance(50):  # joined, then projected
        pen.let("z", both)
        for name in "qkv":
            source = "h" if (name == "q" and kind == "image queries") else "z"
            count = rows if source == "h" else total
            pen.let(name, f"{pen.linear(name, C, C)}({source}){_heads(pen, batch, count)}")
        return total
    for name in "qkv":  # projected, then joined
        pen.let(f"{name}x", f"{pen.linear(name, C, C)}(h){_heads(pen, batch, rows)}")
        if name == "q" and kind == "image queries":
            pen.line("q = qx")
            continue
        pen.let(f"{name}y", f"{pen.linear(name + 'y', C, C)}(y){_heads(pen, batch, OTHER)}")
        parts = f"{name}y, {name}x" if first else f"{name}x, {name}y"
        pen.let(name, f"torch.cat([{parts}], {pen.pick(2, -2)})")
    return total


def _self_projection(pen: Pen, rows: int, batch: int, written: bool) -> None:
    how = pen.pick(
        "three", "chunk", "split", "unflatten", "slices", "tokens first", "low rank", "one for all", "weights"
    )
    if how == "tokens first":
        pen.let("h", "h.transpose(0, 1)")
        pen.let("qkv", f"{pen.linear('qkv', C, 3 * C)}(h)")
        for name, part in zip("qkv", ("[..., :16]", "[..., 16:32]", "[..., 32:]"), strict=True):
            fold = f".reshape({rows}, {batch * HEADS}, {WIDTH}).transpose(0, 1).view({batch}, {HEADS}, {rows}, {WIDTH})"
            pen.let(name, f"qkv{part}{fold}")
    elif how == "unflatten":
        heads = pen.pick(f".unflatten(-1, (3, {HEADS}, {WIDTH}))", f".reshape({batch}, {rows}, 3, {HEADS}, {WIDTH})")
        pen.let("qkv", f"{pen.linear('qkv', C, 3 * C)}(h){heads}.permute(2, 0, 3, 1, 4)")
        pen.line(pen.pick("q, k, v = qkv.unbind(0)", "q, k, v = qkv[0], qkv[1], qkv[2]"))
    elif how in ("chunk", "split", "slices"):
        pen.let("qkv", f"{pen.linear('qkv', C, 3 * C)}(h)")
        part = {
            "chunk": f"qkv.chunk(3, dim={pen.pick(-1, 2)})",
            "split": f"qkv.split({C}, -1)",
            "slices": "qkv[..., :16], qkv[..., 16:32], qkv[:, :, 32:]",
        }
        pen.line(f"q, k, v = {part[how]}")
        for name in "qkv":
            pen.let(name, f"{name}{_heads(pen, batch, rows)}")
    else:
        shared = pen.linear("qkv", C, C) if how == "one for all" else None
        for name in "qkv":
            if how == "low rank":
                value = f"{pen.linear(name + 'up', 4, C)}({pen.linear(name + 'down', C, 4, False)}(h))"
            elif how == "weights":
                weight = pen.layer(name, f"nn.Parameter(torch.randn({C}, {C}) / 12)")
                value = pen.pick(f"F.linear(h, {weight})", f"(h @ {weight}.mT)", f"torch.matmul(h, {weight})")
            else:
                value = f"{shared or pen.linear(name, C, C)}(h)"
            pen.let(name, f"{value}{_heads(pen, batch, rows)}")
            if written and name != "v":
                pen.line("h.mul_(2)")
                written = False


def _heads(pen: Pen, batch: int, rows: int) -> str:
    return pen.pick(
        f".unflatten(-1, ({HEADS}, {WIDTH})).transpose(1, 2)",
        f".view({batch}, {rows}, {HEADS}, {WIDTH}).transpose(1, 2)",
        f".reshape({batch}, {rows}, {HEADS}, -1).permute(0, 2, 1, 3)",
        f".unflatten(2, ({HEADS}, -1)).movedim(2, 1)",
    )


def _position(pen: Pen, rows: int, columns: int) -> None:
    """Norms of q and k, and rotations by position."""
    for name in pen.pick((), (), ("q", "k"), ("k",)):
        norm = pen.pick(
            f"F.rms_norm({name}, ({WIDTH},))", f"{pen.layer(name + 'norm', f'nn.LayerNorm({WIDTH})')}({name})"
        )
        pen.let(name, norm)
    if pen.chance(30):
        for name, count in (("q", rows), ("k", columns)):
            angle = pen.layer(f"{name}angle", f"nn.Buffer(torch.randn({count}, {WIDTH}))")
            turned = f"torch.stack([-{name}[..., 1::2], {name}[..., ::2]], -1).flatten(-2)"
            pen.let(name, f"{name} * {angle}.cos() + {turned} * {angle}.sin()")


def _mask(pen: Pen, batch: int, rows: int, columns: int) -> str | None:
    """A mask [B or 1, 1 or 2, 1 or N, M], boolean (True: attend) or added to the scores; None for none."""
    if pen.chance(60):
        return None
    kind = pen.pick("padding", "padding", "constant", "moving", "full", "bias")
    if kind == "full":
        return pen.let("mask", f"torch.ones({rows}, {columns}, dtype=torch.bool).tril({columns})[None, None]")
    if kind == "bias":
        shape = pen.pick(
            f"1, {HEADS}, {rows}, {columns}", f"{rows}, {columns}", f"1, 1, 1, {columns}", f"1, {HEADS}, 1, {columns}"
        )
        return pen.let("mask", pen.layer("bias", f"nn.Buffer(torch.randn({shape}))"))
    if kind == "moving":
        pen.let("keep", f"(x.mean((1, 2)) * 7).sin()[:, None] > torch.linspace(-0.5, 1.1, {columns})")
        pen.line("keep = keep | ~keep.any(-1, keepdim=True)")
    else:
        lengths = [pen.pick(columns - 5, columns, 3) for _ in range(batch)]
        inside = pen.pick("{0} < {1}", "{0} >= {2} - {1}", "({0} < {1}) | ({0} % 7 == 0)")
        inside = inside.format(f"torch.arange({columns})", f"torch.tensor({lengths})[:, None]", columns)
        where = "self.keep" if kind == "constant" else "keep"
        if kind == "constant":
            pen.layer("keep", f"nn.Buffer({inside})")
        else:
            pen.input("keep", inside)
        pen.line(f"keep = {where}")
    pen.let("mask", f"keep[:, None, None, :]{pen.pick('', '', f'.expand(-1, {HEADS}, {rows}, -1)')}")
    if pen.chance(50):
        low = pen.pick("float('-inf')", "torch.finfo(torch.float32).min", "-1e4")
        zeros = pen.pick(f"torch.zeros(mask.shape).masked_fill(~mask, {low})", f"torch.where(mask, 0.0, {low})")
        if low != "float('-inf')" and pen.chance(30):
            zeros = f"(1 - mask.float()) * {low}"
        pen.let("mask", zeros)
    return "mask"


def _fused(pen: Pen, batch: int, rows: int, columns: int, dropped: bool) -> None:
    extra = pen.pick("", "", ", scale=0.5", f", scale={WIDTH}**-0.5", ", dropout_p=0.0")
    if dropped:
        extra = ", dropout_p=0.3"
    mask = _mask(pen, batch, rows, columns)
    if mask:
        extra += f", attn_mask={mask}"
    elif pen.chance(10) and rows == columns:
        extra += ", is_causal=True"
    grouped = pen.chance(15)
    if grouped:
        pen.line("k, v = k[:, :1], v[:, :1]")
        if pen.chance(50):
            pen.line(f"k, v = (t.{pen.pick('expand(-1, 2, -1, -1)', 'repeat_interleave(2, 1)')} for t in (k, v))")
        else:
            extra += ", enable_gqa=True"
    if not mask and not grouped and pen.chance(15):  # heads in the batch, or one sample at a time
        one = f"F.scaled_dot_product_attention({{}}{extra})"
        folded = one.format("q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)") + f".unflatten(0, ({batch}, {HEADS}))"
        samples = f"torch.cat([{one.format('q[i:i + 1], k[i:i + 1], v[i:i + 1]')} for i in range({batch})])"
        pen.let("o", pen.pick(folded, samples))
        return
    pen.let("o", f"F.scaled_dot_product_attention(q, k, v{extra})")


def _written_out(pen: Pen, form: str, batch: int, rows: int, columns: int, odd: str) -> None:
    """Scores s, weights w, output o [B, 2, N, 8], step by step."""
    scale = pen.pick("after", "before", "none", "over", "on keys", "on both", "spelled")
    if odd in ("scale in the graph", "learnt scale"):
        scale = "odd"
    before = {"before": ("q", "q * 0.35"), "on keys": ("k", "k * 0.5"), "spelled": ("q", f"q / {WIDTH}**0.5")}
    if scale in before:
        pen.let(*before[scale])
    if scale == "on both":
        pen.line("q, k = q * 0.6, k * 0.6")
    folded = form in ("bmm", "baddbmm")
    if folded:
        pen.line("q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))")
    if form == "baddbmm":
        beta = f"torch.zeros({batch * HEADS}, {rows}, {columns}), q, k.transpose(1, 2), beta=0, alpha=0.35"
        pen.let("s", f"torch.baddbmm({beta})")
    elif form == "bmm":
        pen.let("s", "torch.bmm(q, k.transpose(-1, -2))")
    elif form == "einsum":
        pen.let("s", f"torch.einsum('{pen.pick('bhnd,bhmd->bhnm', 'bhid,bhjd->bhij', '...nd,...md->...nm')}', q, k)")
    else:
        pen.let("s", pen.pick("q @ k.transpose(-2, -1)", "torch.matmul(q, k.mT)", "q.matmul(k.permute(0, 1, 3, 2))"))
    after = {"after": "s * 0.35", "over": f"s / {WIDTH**0.5}", "odd": f"s * {_odd_scale(pen, odd)}"}
    if scale in after:
        pen.let("s", after[scale])
    if not odd and not folded and (mask := _mask(pen, batch, rows, columns)):
        pen.line(f"s = s.masked_fill(~{mask}, float('-inf')) if {mask}.dtype == torch.bool else s + {mask}")
    if odd == "scores used elsewhere":
        pen.line("extra = s.amax(-1, keepdim=True)")
    _weights(pen, odd, folded)
    if odd == "values written to":
        pen.line("v.mul_(1.5)")
    equation = pen.pick("bhnm,bhmd->bhnd", "bhij,bhjd->bhid")
    pen.let("o", f"torch.einsum('{equation}', w, v)" if form == "einsum" else pen.pick("w @ v", "torch.matmul(w, v)"))
    if odd in ("scores used elsewhere", "weights used elsewhere"):
        pen.line("o = o + extra")
    if folded:
        pen.line(f"o = o.view({batch}, {HEADS}, {rows}, {WIDTH})")


def _odd_scale(pen: Pen, odd: str) -> str:
    if odd == "learnt scale":
        return pen.layer("scale", "nn.Parameter(torch.tensor(0.4))")
    return "x.mean()" if odd == "scale in the graph" else "1.0"


def _weights(pen: Pen, odd: str, folded: bool) -> None:
    last = 2 if folded else 3
    dim = {"softmax over queries": last - 1, "softmax over heads": 0 if folded else 1}.get(odd) or pen.pick(-1, last)
    if odd == "scores written to":
        pen.line(pen.pick("s.mul_(2)", "s[..., 0] = 0", "s += 1"))
    if odd == "keys written to":
        pen.line("k.add_(1)")
    dim = 0 if odd == "softmax over heads" and folded else dim
    softmax = pen.pick(
        f"s.softmax({dim})",
        f"F.softmax(s, dim={dim})",
        f"torch.softmax(s, {dim}, dtype=torch.float32)",
        f"s.float().softmax(dim={dim}).to(v.dtype)",
        f"s.double().softmax({dim}).to(v.dtype)",
    )
    if pen.chance(8):
        softmax = f"(s - s.amax({dim}, keepdim=True)).softmax({dim})"
    softmax = "s.relu()" if odd == "no softmax" else softmax
    pen.let("w", softmax)
    if odd == "weights dropped":
        pen.line("w = F.dropout(w, 0.3, training=True)")
    if odd == "weights squared":
        pen.line("w = w ** 2")
    if odd == "sharpened after":
        pen.line("w = w / w.sum(-1, keepdim=True).sqrt()")
    if odd == "weights used elsewhere":
        pen.line("extra = w.amax(-1, keepdim=True)")
    if odd == "weights written to":
        pen.line(pen.pick("w[..., 0] = 0", "w.mul_(0.5)"))
