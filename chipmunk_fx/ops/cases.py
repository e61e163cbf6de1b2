"""Inputs on which every implementation of an operator has to agree with its formula, and how closely.

A kernel backend is tested by being listed in chipmunk_fx.kernels.BACKENDS: the conformance tests run it on the cases
below. Caches arrive filled with NaN and -1, so that what an operator forgets to write is seen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.ops import fp8
from chipmunk_fx.ops.groups import group_count
from chipmunk_fx.ops.library import argument_names, settled

_POISON = {torch.int32: -1}


def tolerance(plain: Tensor, exact: Tensor) -> float:
    """Largest error allowed: twice that of plain PyTorch in the same dtype, both against fp64, plus 1e-6."""
    return 2 * largest_error(plain, exact) + 1e-6


def largest_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).abs().max().item()


def call(op: str, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of the operator `op`, picked by name out of `values`."""
    return [values[n] for n in argument_names(op)], {n: values[n] for n in argument_names(op, keywords=True)}


def arguments(op: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What an implementation of `op` is called with: all arguments by name, `span` and `known` being met before."""
    names = [*argument_names(op), *argument_names(op, keywords=True)]
    return settled({name: values[name] for name in names})


@dataclass(frozen=True)
class AttentionCase:
    """rows and keys: N and M; grouped: rows that the order names (None: no order, all rows); fixed: always-on columns.

    near: always-on columns beyond `fixed`, of the group of most (None: no group has its own, lists are not ragged).
    layout: "heads_first" is contiguous [B, H, N, D]; "tokens_first" the transpose of [B, N, H, D]; "fused" slices of
    one [B, N, 3, H, D] (rows equal keys). key_heads: heads of k and v (None: as many as of q). present: valid keys of
    each batch entry, scattered over the sequence (None: all of all). again: a refresh has been before, whose
    denominators are kept.
    """

    rows: int
    keys: int
    width: int
    group_rows: int
    columns: int
    batch: int = 1
    heads: int = 2
    layout: str = "tokens_first"
    grouped: int | None = None
    fixed: int = 0
    near: int | None = None
    random_density: float = 0.02
    power: float = 0.5
    mass_stride: int = 1
    step: int = 3
    key_heads: int | None = None
    present: tuple[int, ...] | None = None
    again: bool = False

    @property
    def groups(self) -> int:
        return group_count(self.grouped or self.rows, self.group_rows)

    def projections(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """q, k and v alone: as a step later when the seed differs."""
        generator = torch.Generator(device).manual_seed(seed)
        normal: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        if self.layout == "fused":
            fused = torch.randn(self.batch, self.rows, 3, self.heads, self.width, **normal)
            q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))
        else:
            lengths = (self.rows, self.keys, self.keys)
            heads = (self.heads, self.key_heads or self.heads, self.key_heads or self.heads)
            shapes = [(self.batch, n, h, self.width) for n, h in zip(lengths, heads, strict=True)]
            q, k, v = (torch.randn(shape, **normal).transpose(1, 2) for shape in shapes)
        if self.layout == "heads_first":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return {"q": q, "k": k, "v": v}

    def values(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Every argument of the two attention operators by name."""
        generator = torch.Generator().manual_seed(seed)
        order = None
        if self.grouped is not None:
            order = torch.randperm(self.rows, generator=generator)[: self.grouped].int().to(device)
        always = None
        if self.fixed:
            always = torch.zeros(1, self.keys, dtype=torch.bool)
            always[0, torch.randperm(self.keys, generator=generator)[: self.fixed]] = True
        if self.near is not None:
            always = self._own_columns(always, generator)
        valid = None
        if self.present is not None:
            ranks = torch.rand(self.batch, self.keys, generator=generator).argsort(1)
            valid = (ranks < torch.tensor(self.present).unsqueeze(1)).to(device)
        head = (self.batch, self.heads)
        return self.projections(dtype, device, seed) | {
            "order": order,
            "always": None if always is None else always.to(device),
            "valid": valid,
            "span": None,
            "clock": torch.tensor([self.step, 1], device=device),
            "known": torch.ones(1, dtype=torch.bool) if self.again else None,
            "rest": _poisoned((*head, self.rows, self.width), dtype, device),
            "share": _poisoned((*head, self.rows), torch.float32, device),
            "lists": _poisoned((*head, self.groups, self.columns), torch.int32, device),
            "lse": self._earlier(dtype, device, seed) if self.again else None,
            "scale": 1.3 / math.sqrt(self.width),
            "group_rows": self.group_rows,
            "random_density": self.random_density,
            "power": self.power,
            "mass_stride": self.mass_stride,
            "renew": True,
            "ragged": self.near is not None,
            "seed": 11,
            "site": 5,
            "sdpa": "",
        }

    def _earlier(self, dtype: torch.dtype, device: str, seed: int) -> Tensor:
        """Logarithms of denominators like those of a refresh some steps ago."""
        q, k = (self.projections(dtype, device, seed)[name].float() for name in ("q", "k"))
        scores = q @ k.repeat_interleave(self.heads // k.shape[1], 1).mT * (1.3 / math.sqrt(self.width))
        return scores.logsumexp(-1) + torch.linspace(-0.5, 0.5, self.rows, device=device)

    def _own_columns(self, always: Tensor | None, generator: torch.Generator) -> Tensor:
        """bool [G, M]: of the first group none but those of all, of the last `near` more."""
        counts = torch.linspace(0, self.near or 0, self.groups).long().unsqueeze(1)
        own = torch.rand(self.groups, self.keys, generator=generator).argsort(1) < counts
        return own if always is None else own | always


@dataclass(frozen=True)
class MlpCase:
    """lead: the dimensions before the width; neurons: F; narrow: w2 is a slice of the columns of a larger weight; fp8: the
    products of a sparse step are made in it.
    """

    lead: tuple[int, ...]
    width: int
    neurons: int
    group_rows: int
    columns: int
    result: int = 24
    gated: bool = False
    biased: bool = True
    narrow: bool = False
    ordered: bool = False
    activation: str = "gelu_tanh"
    random_density: float = 0.05
    step: int = 3
    fp8: bool = False

    @property
    def batch(self) -> int:
        return self.lead[0] if len(self.lead) > 1 else 1

    @property
    def rows(self) -> int:
        return math.prod(self.lead) // self.batch

    def tokens(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
        """x alone: as a step later when the seed differs."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(*self.lead, self.width, dtype=dtype, device=device, generator=generator)

    def values(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Every argument of the two MLP operators by name."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device, generator=generator) / math.sqrt(shape[-1])

        wide = normal(self.result, self.neurons + (16 if self.narrow else 0))
        groups, parts = group_count(self.rows, self.group_rows), 1 + self.gated
        hidden = (self.batch, groups, self.neurons, self.group_rows)
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed)).int().to(device)
        return {
            "x": self.tokens(dtype, device, seed),
            "w1": normal(self.neurons, self.width),
            "b1": normal(self.neurons) if self.biased else None,
            "wu": normal(self.neurons, self.width) if self.gated else None,
            "bu": normal(self.neurons) if self.gated and self.biased else None,
            "w2": wide[:, wide.shape[1] - self.neurons :],
            "b2": normal(self.result) if self.biased else None,
            "order": order if self.ordered else None,
            "clock": torch.tensor([self.step, 1], device=device),
            "hidden": _poisoned(hidden, dtype, device),
            "out": _poisoned((self.batch, self.rows, self.result), torch.float32, device),
            "mean": _poisoned(hidden[:3], torch.float32, device),
            "lists": _poisoned((*hidden[:2], self.columns), torch.int32, device),
            "by_neuron": _poisoned((self.neurons, self.result), fp8.DTYPE if self.fp8 else dtype, device),
            "w1_fp8": _poisoned((parts, self.neurons, self.width), fp8.DTYPE, device) if self.fp8 else None,
            "scales": _poisoned((parts + 1,), torch.float32, device) if self.fp8 else None,
            "change_scale": _poisoned((1,), torch.float32, device) if self.fp8 else None,
            "activation": self.activation,
            "group_rows": self.group_rows,
            "random_density": self.random_density,
            "seed": 11,
            "site": 5,
        }


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, _POISON.get(dtype, math.nan), dtype=dtype, device=device)


ATTENTION_CASES = (
    AttentionCase(rows=512, keys=512, width=64, group_rows=128, columns=96),
    AttentionCase(rows=63, keys=63, width=40, group_rows=16, columns=20, layout="heads_first", batch=3),
    AttentionCase(rows=111, keys=111, width=72, group_rows=32, columns=1, random_density=0.0, layout="fused"),
    AttentionCase(rows=111, keys=111, width=80, group_rows=48, columns=111, power=1.0),
    AttentionCase(rows=200, keys=111, width=96, group_rows=64, columns=40, power=0.0, fixed=7),
    AttentionCase(rows=111, keys=200, width=128, group_rows=16, columns=48, mass_stride=4, grouped=111),
    AttentionCase(rows=200, keys=200, width=64, group_rows=48, columns=64, mass_stride=3, grouped=170, fixed=30),
    AttentionCase(rows=63, keys=63, width=64, group_rows=128, columns=32, layout="fused", batch=3, fixed=20),
    AttentionCase(rows=1000, keys=1000, width=64, group_rows=128, columns=176, mass_stride=4, grouped=1000, heads=3),
    AttentionCase(rows=111, keys=111, width=64, group_rows=48, columns=32, heads=4, key_heads=2, mass_stride=2),
    AttentionCase(rows=63, keys=200, width=40, group_rows=16, columns=48, heads=3, key_heads=1, batch=2),
    AttentionCase(rows=111, keys=111, width=64, group_rows=48, columns=32, batch=3, present=(111, 80, 33), fixed=7),
    AttentionCase(rows=200, keys=111, width=64, group_rows=64, columns=64, batch=3, present=(64, 20, 1), grouped=150),
    AttentionCase(rows=63, keys=63, width=64, group_rows=32, columns=63, batch=2, present=(63, 40), key_heads=1),
    AttentionCase(rows=63, keys=63, width=32, group_rows=16, columns=16, batch=2, present=(0, 30)),
    AttentionCase(rows=63, keys=2500, width=64, group_rows=32, columns=300, heads=1, fixed=11, mass_stride=8),
    AttentionCase(rows=200, keys=200, width=64, group_rows=32, columns=112, fixed=9, near=60, grouped=180, heads=3),
    AttentionCase(rows=111, keys=111, width=64, group_rows=16, columns=80, near=70, random_density=0.0),
    AttentionCase(rows=111, keys=111, width=64, group_rows=32, columns=64, batch=3, present=(111, 60, 9), near=40),
    AttentionCase(rows=111, keys=111, width=64, group_rows=32, columns=80, batch=2, present=(80, 60), near=40),
    AttentionCase(
        rows=300, keys=120, width=256, group_rows=192, columns=64, heads=1, mass_stride=4, layout="heads_first"
    ),
)
EARLIER_CASES = (
    AttentionCase(
        rows=200, keys=200, width=64, group_rows=48, columns=64, mass_stride=3, grouped=170, fixed=30, again=True
    ),
    AttentionCase(rows=111, keys=111, width=64, group_rows=128, columns=32, heads=4, key_heads=2, batch=2, again=True),
    AttentionCase(rows=63, keys=63, width=64, group_rows=32, columns=63, layout="fused", batch=2, again=True),
    AttentionCase(rows=111, keys=111, width=64, group_rows=48, columns=32, batch=3, present=(111, 80, 33), again=True),
    AttentionCase(rows=420, keys=200, width=64, group_rows=192, columns=112, fixed=9, near=60, grouped=400, again=True),
    AttentionCase(rows=300, keys=517, width=128, group_rows=192, columns=1, random_density=0.0, power=0.0, again=True),
)
LONG_ATTENTION_CASES = (
    AttentionCase(rows=4353, keys=4353, width=128, group_rows=128, columns=768, mass_stride=4, grouped=4353, heads=4),
    AttentionCase(rows=1000, keys=4353, width=80, group_rows=256, columns=320, batch=3, present=(4353, 1000, 63)),
    AttentionCase(rows=1000, keys=1000, width=128, group_rows=192, columns=256, layout="fused", grouped=936, fixed=64),
    AttentionCase(
        rows=700, keys=900, width=128, group_rows=192, columns=200, heads=4, key_heads=2, batch=2, present=(900, 130)
    ),
    AttentionCase(rows=900, keys=900, width=128, group_rows=192, columns=500, grouped=860, fixed=20, near=300),
    AttentionCase(rows=900, keys=700, width=128, group_rows=256, columns=333, batch=2, present=(0, 500), power=0.0),
    AttentionCase(rows=500, keys=500, width=64, group_rows=384, columns=131, grouped=450, layout="heads_first"),
    AttentionCase(rows=4353, keys=4353, width=128, group_rows=192, columns=900, mass_stride=4, heads=6, again=True),
    AttentionCase(
        rows=900, keys=3000, width=128, group_rows=128, columns=2900, batch=2, grouped=860, near=700, again=True
    ),
    AttentionCase(rows=777, keys=777, width=64, group_rows=256, columns=333, layout="fused", mass_stride=8, again=True),
)
MLP_CASES = (
    MlpCase(lead=(1, 512), width=64, neurons=256, group_rows=128, columns=80),
    MlpCase(lead=(63,), width=40, neurons=111, group_rows=16, columns=40, activation="gelu"),
    MlpCase(lead=(3, 111), width=72, neurons=200, group_rows=32, columns=1, random_density=0.0, biased=False),
    MlpCase(lead=(3, 111), width=32, neurons=96, group_rows=48, columns=96, ordered=True, activation="relu2"),
    MlpCase(lead=(2, 5, 21), width=64, neurons=128, group_rows=16, columns=40, gated=True, activation="silu"),
    MlpCase(lead=(1, 63), width=64, neurons=111, group_rows=128, columns=30, gated=True, biased=False, narrow=True),
    MlpCase(lead=(2, 200), width=80, neurons=300, group_rows=64, columns=96, ordered=True, narrow=True),
    MlpCase(lead=(1, 1000), width=128, neurons=512, group_rows=128, columns=176, result=128, ordered=True),
    MlpCase(lead=(2, 111), width=128, neurons=200, group_rows=32, columns=64, ordered=True, fp8=True),
    MlpCase(lead=(63,), width=256, neurons=96, group_rows=16, columns=40, biased=False, activation="gelu", fp8=True),
    MlpCase(lead=(1, 2, 40), width=128, neurons=96, group_rows=16, columns=48, gated=True, activation="silu", fp8=True),
)
LONG_MLP_CASES = (
    MlpCase(lead=(1, 4353), width=512, neurons=2048, group_rows=128, columns=1300, result=1088, ordered=True),
    MlpCase(lead=(2, 4353), width=512, neurons=2048, group_rows=192, columns=1300, result=512),
    MlpCase(lead=(3, 1000), width=320, neurons=1000, group_rows=192, columns=300, result=320, gated=True),
    MlpCase(lead=(1, 1000), width=576, neurons=2000, group_rows=192, columns=333, result=640, ordered=True),
    MlpCase(
        lead=(2, 700), width=512, neurons=1000, group_rows=384, columns=200, result=320, gated=True, activation="silu"
    ),
    MlpCase(
        lead=(1, 500), width=768, neurons=1500, group_rows=256, columns=165, result=256, activation="gelu", biased=False
    ),
    MlpCase(
        lead=(1, 300), width=512, neurons=900, group_rows=128, columns=500, result=512, activation="relu2", narrow=True
    ),
    MlpCase(lead=(1, 4353), width=512, neurons=2048, group_rows=192, columns=1300, result=1216, ordered=True, fp8=True),
    MlpCase(lead=(2, 1000), width=640, neurons=1000, group_rows=128, columns=333, result=320, fp8=True, biased=False),
    MlpCase(lead=(1, 700), width=768, neurons=900, group_rows=384, columns=200, result=576, gated=True, fp8=True),
    MlpCase(
        lead=(500,),
        width=1024,
        neurons=1111,
        group_rows=192,
        columns=165,
        biased=False,
        narrow=True,
        result=256,
        fp8=True,
    ),
    MlpCase(
        lead=(1, 400),
        width=512,
        neurons=800,
        group_rows=192,
        columns=99,
        gated=True,
        activation="silu",
        result=512,
        fp8=True,
        ordered=True,
        biased=False,
    ),  # fmt: skip
)
