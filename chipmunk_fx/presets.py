"""Named settings: those published for each model (arXiv 2506.03275 and its configuration files), and "exact".

A preset names what its publication names. Step skipping is published for 50 steps and left to the user, because lists
are literal: in a shorter generation the same list would skip most of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_FLUX = {
    "attention.density": 0.165,
    "attention.random_density": 0.0,
    "attention.renew_lists": False,
    "mlp.density": 0.30,
    "mlp.random_density": 0.05,
    "mlp.list_lifetime": 2,
    "schedule.refresh_every": 10,
}

_HUNYUAN = {
    "attention.density": 0.05,
    "attention.random_density": 0.01,
    "attention.text_rows": "dense",
    "mlp.enabled": False,
    "schedule.refresh_steps": (0, 1, 10, 40),
    "memory.offload": "all",
}

_WAN = {
    "attention.density": 0.10,
    "attention.random_density": 0.01,
    "attention.local_voxels": 5,
    "mlp.enabled": False,
    "schedule.refresh_every": 10,
    "schedule.branches": 2,
    "tokens.order": "raster",
    "memory.offload": "all",
}

_EXACT = {
    "attention.density": 1.0,
    "attention.random_density": 0.0,
    "attention.dense_layers": 0,
    "mlp.density": 1.0,
    "mlp.random_density": 0.0,
    "mlp.dense_layers": 0,
    "schedule.skip_steps": None,
    "schedule.skip_threshold": None,
    "gate": "off",
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "flux": MappingProxyType(_FLUX),
        "hunyuan": MappingProxyType(_HUNYUAN),
        "wan": MappingProxyType(_WAN),
        "mochi": MappingProxyType(_HUNYUAN),  # published as "like HunyuanVideo"
        "exact": MappingProxyType(_EXACT),
    }
)
