"""The cost gate: why a site would not be faster sparse, from measured costs."""

from __future__ import annotations

import torch

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Site
from chipmunk_fx.kernels import BACKENDS, HOPPER_GROUP_ROWS, on_hopper
from chipmunk_fx.runtime.costs import (
    CUDA_ATTENTION,
    CUDA_ATTENTION_HOPPER,
    CUDA_ATTENTION_RECORDED,
    CUDA_MLP_HOPPER,
    CUDA_MLP_RECORDED,
    at,
)
from chipmunk_fx.runtime.footprint import density
from chipmunk_fx.runtime.precision import in_fp8
from chipmunk_fx.runtime.variants import records_graphs

# Least rows for which ten steps with one refresh beat ten dense ones: bounds set between sizes measured on two cores with
# AVX-512 and AMX at the default densities (3 heads of 64; ms for dense, refresh, sparse). fp32 attention: 512 rows 0.75,
# 3.0, 0.71; 1040 rows 3.6, 8.0, 1.7. bf16: 1040 rows 1.3, 6.1, 1.2; 4112 rows 16, 39, 7.5. fp32 MLP 192 to 768: 1024 rows
# 2.9, 3.5, 2.4; 4096 rows 10.6, 13.1, 7.5. bf16 MLP: 4096 rows 4.1, 7.1, 5.0, since AMX makes dense products so fast.
_CPU_ROWS = {
    ("attention", torch.float32): 768,
    ("attention", torch.bfloat16): 2048,
    ("attention", torch.float16): 2048,
    ("mlp", torch.float32): 2048,
}
# Share of columns above which a site stays dense: estimated from the cost at the default densities, not swept.
_CPU_DENSITY = {"attention": 0.4, "mlp": 0.5}
# What a sparse step takes more where fp8 is emulated: one core, 4096 rows, 256 to 1024, fp32, density 0.36: 93 ms for 56.
_CPU_FP8 = 1.65
# Of the first linear, between 9 MB (150 ms dense, 85 sparse) and 151 MB (626 dense, 2277 sparse, gathered from memory).
_CPU_WEIGHT_BYTES = 16e6

# Attention: measured in costs.py from 4352 rows on; MLP: with 5.8e11 operations and more. Without kernels/hopper, an MLP of 4352
# rows, 3072 to 12288, density 0.30, on an H200: dense 1.01 ms, refresh 2.2, sparse 1.3.
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_ROWS = 4096
_CUDA_MLP_FLOPS = 5e11
# ... and with the Hopper kernels in CUDA graphs, which launch nothing one by one
_RECORDED_ROWS = 2048
_RECORDED_MLP_FLOPS = 2.4e11


def cost_gate(site: Site, config: Config) -> str | None:
    """Why `site` stays dense with gate="auto"; None where sparse steps are expected to be faster."""
    if site.device.type == "cuda":
        return _on_cuda(site, config)
    sizes, share = site.hints, density(site, config)
    rows, least = sizes[2 if site.kind == "attention" else 1], _CPU_ROWS.get((site.kind, site.dtype))
    if least is None:
        return f"{site.kind} in {site.dtype} on {site.device.type}: sparse is not faster"
    if rows < least:
        return f"{rows} rows in {site.dtype}: sparse is not faster below {least}"
    emulated = in_fp8(site, config)
    most = _CPU_DENSITY[site.kind] / (_CPU_FP8 if emulated else 1)
    if share > most:
        return f"density {share:.2f}{' in emulated fp8' if emulated else ''}: sparse is not faster above {most:.2g}"
    if site.kind == "mlp" and (weight := sizes[2] * sizes[3] * site.dtype.itemsize) > _CPU_WEIGHT_BYTES:
        return f"weights of {weight / 1e6:.0f} MB: sparse is not faster above {_CPU_WEIGHT_BYTES / 1e6:.0f} MB"
    return None


def _on_cuda(site: Site, config: Config) -> str | None:
    if not BACKENDS:
        return 'no kernel backend for cuda: plain PyTorch is slower than dense (gate="off" runs it)'
    if site.dtype not in _CUDA_DTYPES:
        return f"{site.kind} in {site.dtype} on cuda: sparse is not faster"
    in_groups = site.group_rows % HOPPER_GROUP_ROWS == 0
    hopper = in_groups and on_hopper(site.kind, site.device, site.dtype, site.hints)
    recorded = hopper and records_graphs(config)
    share, every = density(site, config), config.schedule.refresh_every
    if site.kind == "attention":
        rows, least = site.hints[2], _RECORDED_ROWS if recorded else _CUDA_ROWS
        if rows < least:
            return f"{rows} rows on cuda: sparse is not faster below {least}"
        measured = CUDA_ATTENTION_HOPPER if hopper else CUDA_ATTENTION
        size, cost = f"{rows} rows", at(rows, CUDA_ATTENTION_RECORDED if recorded else measured).steps(share, every)
    else:
        if not hopper:
            return "mlp on cuda: sparse is faster only by the Hopper kernels, in groups of 192 rows and multiples of 64 wide"
        least = _RECORDED_MLP_FLOPS if recorded else _CUDA_MLP_FLOPS
        if site.dense_flops < least:
            return f"{site.dense_flops:.1e} operations on cuda: sparse is not faster below {least:.2g}"
        model = CUDA_MLP_RECORDED if site.dense_flops < _CUDA_MLP_FLOPS else CUDA_MLP_HOPPER
        size, cost = f"{site.dense_flops:.1e} operations", model.steps(share, every, in_fp8(site, config))
    if cost > 1:
        return f"density {share:.2f} of {size} on cuda, refreshed every {every} steps: {cost:.2f} of the dense time"
    return None
