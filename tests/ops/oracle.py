"""The formulas of the operators, one group at a time over whole matrices, in any dtype: fp64 is the truth that results
are compared with, the dtype of the inputs gives the error that plain PyTorch makes."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def groups(values: dict[str, Any], rows: int) -> list[Tensor]:
    """Row indices of each group."""
    order = torch.arange(rows) if values["order"] is None else values["order"].long().cpu()
    return list(order.split(values["group_rows"]))


def wide(values: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same numbers in another floating-point dtype."""
    cast = {n: v.to(dtype) for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return values | cast


def scores(values: dict[str, Any]) -> Tensor:
    """Keys that are not valid score -inf."""
    k = heads(values, "k")
    s = (values["q"] @ k.mT).to(torch.promote_types(values["q"].dtype, torch.float32)) * values["scale"]
    valid = values.get("valid")
    return s if valid is None else s.masked_fill(~valid[:, None, None], -torch.inf)


def heads(values: dict[str, Any], name: str) -> Tensor:
    """k or v with as many heads as q."""
    x, count = values[name], values["q"].shape[-3] if values["q"].ndim == 4 else 1
    return x if x.ndim == 2 or x.shape[1] == count else x.repeat_interleave(count // x.shape[1], 1)


def attention(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Dense result and log denominators; 0 and -inf where there is no key to attend to."""
    s = scores(values)
    return s.softmax(-1).nan_to_num(0).to(values["v"].dtype) @ heads(values, "v"), s.logsumexp(-1)


def masses(values: dict[str, Any]) -> Tensor:
    """[B, H, G, M], weighed by `lse` where that is given."""
    s = scores(values)
    weighed_by = s.logsumexp(-1) if values["lse"] is None else values["lse"]
    p = (s - weighed_by.unsqueeze(-1)).exp().nan_to_num(0)
    stride, last = values["mass_stride"], values["group_rows"] - 1
    sampled = [min(first + 3 * i % stride, last) for i, first in enumerate(range(0, last + 1, stride))]
    rows = ([g[i] for i in sampled if i < len(g)] for g in groups(values, p.shape[2]))
    return torch.stack([p[:, :, some].sum(2) for some in rows], 2)


def selected(values: dict[str, Any], lists: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(batch entry, head, rows, result over the listed columns, log denominators) of each group."""
    k, v = heads(values, "k"), heads(values, "v")
    for b in range(values["q"].shape[0]):
        for h in range(values["q"].shape[1]):
            for g, rows in enumerate(groups(values, values["q"].shape[2])):
                chosen = lists[b, h, g].long()
                chosen = chosen[chosen < k.shape[2]]
                part = {"q": values["q"][b, h, rows], "k": k[b, h, chosen], "v": v[b, h, chosen]}
                yield (b, h, rows, *attention(part | {"scale": values["scale"]}))


def sparse_attention(values: dict[str, Any]) -> Tensor:
    """rest + share * selected; rows in no group are dense."""
    out = attention(values)[0].clone()
    for b, h, rows, part, _ in selected(values, values["lists"]):
        out[b, h, rows] = (values["rest"][b, h, rows] + values["share"][b, h, rows, None] * part).to(out.dtype)
    return out


def remainder(values: dict[str, Any], lists: Tensor) -> tuple[Tensor, Tensor]:
    """rest and share as a refresh leaves them; zero for rows in no group."""
    out, lse = attention(values)
    rest, share = torch.zeros_like(out), torch.zeros_like(lse)
    for b, h, rows, part, part_lse in selected(values, lists):
        share[b, h, rows] = (values["power"] * (part_lse - lse[b, h, rows])).exp().nan_to_num(0)
        rest[b, h, rows] = (out[b, h, rows] - share[b, h, rows, None] * part).to(out.dtype)
    return rest, share


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, batched: bool) -> Tensor:
    """x [.., C] weight^T + bias; batched: as one of a batch of products, which a GPU adds up in another order than one alone
    (H200, fp32, sums of 640: largest error 1.3e-6 alone with 128 rows, 5.3e-6 in a batch, 5.8e-6 alone with 4352 rows)."""
    if not batched:
        return F.linear(x, weight, bias)
    product = torch.bmm(torch.stack([x, x]), torch.stack([weight, weight]).mT)[0]
    return product if bias is None else product + bias


def hidden(values: dict[str, Any], x: Tensor, batched: bool = False) -> Tensor:
    """Activations [rows, neurons] of x [rows, C]."""
    a = ACTIVATIONS[values["activation"]](linear(x, values["w1"], values["b1"], batched))
    return a if values["wu"] is None else a * linear(x, values["wu"], values["bu"], batched)


def hidden_in_fp8(values: dict[str, Any], x: Tensor, chosen: Tensor) -> Tensor:
    """The same from `w1_fp8` and x in e4m3, summed up in fp32 at least and rounded to x's dtype once."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    eight, row_scale = (part.to(accurate) for part in in_fp8(x))

    def of(part: int, bias: str) -> Tensor:
        weight, scale = (values[name][part].to(accurate) for name in ("w1_fp8", "scales"))
        sums = eight @ weight[chosen].mT * row_scale * scale
        return (sums if values[bias] is None else sums + values[bias][chosen].to(accurate)).to(x.dtype)

    a = ACTIVATIONS[values["activation"]](of(0, "b1"))
    return a if values["wu"] is None else a * of(1, "bu")


def added(values: dict[str, Any], change: Tensor, chosen: Tensor, batched: bool = False) -> Tensor:
    """What changes [R, K] of the neurons `chosen` add to rows of the result, [R, C2]."""
    return linear(change, values["w2"][:, chosen], None, batched)


def added_in_fp8(values: dict[str, Any], change: Tensor, chosen: Tensor, batched: bool = False) -> Tensor:
    """The same from `by_neuron` and changes in e4m3, summed up in fp32 at least."""
    accurate = torch.promote_types(change.dtype, torch.float32)
    weight, scale = values["by_neuron"].to(accurate)[chosen], values["change_scale"]
    eight = (change.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (eight.to(accurate) @ weight * (values["scales"][-1] * scale)).to(change.dtype)


def undecided(values: dict[str, Any], lists: Tensor, stored: Tensor, slack: float) -> Tensor:
    """[B, N, C2]: by how much `out` may be off because a change that is off by `slack` rounds to the next e4m3 number.

    stored: hidden after the step in fp64, whose changes are taken from the one before it.
    """
    x, wide_scale = batches(values["x"]), values["change_scale"].double()
    off = torch.zeros(*x.shape[:2], values["out"].shape[-1], dtype=torch.float64, device=x.device)
    for b in range(x.shape[0]):
        for g, rows in enumerate(groups(values, x.shape[1])):
            chosen = lists[b, g].long()
            change = (stored - values["hidden"])[b, g, chosen, : len(rows)].mT
            low, high = (((change + d) / wide_scale).float().to(torch.float8_e4m3fn).double() for d in (-slack, slack))
            weight = values["by_neuron"].double()[chosen].abs()
            off[b, rows] = (high - low) @ weight * (values["scales"][-1].double() * wide_scale)
    return off


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [.., C] as e4m3 numbers and their scale [.., 1] in fp32."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest * (1 / 448), torch.ones_like(largest))
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def worst_in_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error of x [.., C] weight^T [C, F] with both rounded to e4m3: (|x| + dx) (|w| + dw) - |x| |w|, summed up.

    dx, dw: 2^-4 of a number, by three bits after the point, and never less than half of the least step, 2^-10 of the scale.
    """

    def roundoff(values: Tensor, largest: Tensor) -> Tensor:
        return torch.maximum(values / 16, largest / 448 / 1024)

    x, w = x.abs(), weight.abs()
    return (x + roundoff(x, x.amax(-1, keepdim=True))) @ (w + roundoff(w, w.max())).mT - x @ w.mT


def batches(x: Tensor) -> Tensor:
    """[B, N, C]."""
    return x.reshape(x.shape[0] if x.ndim > 2 else 1, -1, x.shape[-1])


def mlp(values: dict[str, Any]) -> Tensor:
    """[B, N, C2]."""
    return F.linear(hidden(values, batches(values["x"])), values["w2"], values["b2"])


def group_means(values: dict[str, Any]) -> Tensor:
    """[B, G, F]: first product of each group's mean row, through the activation where there is an up branch."""
    x = batches(values["x"])
    accurate = torch.promote_types(x.dtype, torch.float32)
    pooled = torch.stack([x[:, g].to(accurate).mean(1).to(x.dtype) for g in groups(values, x.shape[1])], 1)
    return hidden(values, pooled) if values["wu"] is not None else F.linear(pooled, values["w1"], values["b1"])


def sparse_mlp(values: dict[str, Any], lists: Tensor, batched: bool = False) -> tuple[Tensor, Tensor]:
    """out [B, N, C2] and hidden [B, G, F, R] after a sparse step over `lists`, from those before it. batched: as `linear`.

    All rows go through the first product at once, as in the model: on a GPU a few rows are added up in another order.
    """
    x, out, stored = batches(values["x"]), values["out"].clone(), values["hidden"].clone()
    fp8 = values["w1_fp8"] is not None
    second = added_in_fp8 if fp8 else added
    for b in range(x.shape[0]):
        every = None if fp8 else hidden(values, x[b], batched)
        for g, rows in enumerate(groups(values, x.shape[1])):
            chosen = lists[b, g].long()
            new = hidden_in_fp8(values, x[b, rows], chosen) if every is None else every[rows][:, chosen]
            change = new - stored[b, g, chosen, : len(rows)].mT
            out[b, rows] += second(values, change, chosen, batched).to(out.dtype)
            stored[b, g, chosen, : len(rows)] = new.mT
    return out, stored
