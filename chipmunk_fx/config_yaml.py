"""Config files: reading YAML, and translating the format of the original Chipmunk into our settings.

In the original's format every key that is left out has a default of its own (ORIGINAL below), so a translated file says
everything its author meant, whatever our own defaults are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from chipmunk_fx.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """A value for one of our keys. `key` and `source` say where it was written, for errors."""

    value: Any
    key: str
    source: str | None = None


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [name for place, name in enumerate(written) if name in written[:place]]
        if twice and not node.tag.endswith(":set"):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError naming the file and what is wrong with it otherwise."""
    shown = os.fspath(path)
    try:
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader=_OnceLoader)
    except FileNotFoundError:
        raise ConfigError.unreadable(shown, "there is no such file") from None
    except OSError as error:
        raise ConfigError.unreadable(shown, f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError.unreadable(shown, "it is not text in UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError.unreadable(shown, f"it is not plain YAML ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError.unreadable(shown, f"it holds a {type(content).__name__}, not a mapping of settings")
    return content


# The original's settings and what it takes for those that a file leaves out.
ORIGINAL: Mapping[str, Any] = MappingProxyType(
    {
        "num_model_invocations_per_inference_step": None,  # inferred, unless a file names it
        "steps": None,
        "world_size": 1,
        "mlp.is_enabled": True,
        "mlp.is_fp8": False,
        "mlp.top_keys": 0.3,
        "mlp.random_keys": 0.05,
        "mlp.full_step_every": 10,
        "mlp.block_mask_cache": 2,
        "mlp.first_n_dense_layers": 2,
        "patchify.is_enabled": True,
        "patchify.chunk_size_1": 8,
        "patchify.chunk_size_2": 4,
        "attn.is_enabled": True,
        "attn.top_keys": 0.05,
        "attn.random_keys": None,  # 0.01, see _random_share
        "attn.local_voxels": 0,
        "attn.local_1d_window": 0,
        "attn.first_n_dense_layers": 2,
        "attn.full_step_every": 10,
        "attn.full_step_schedule": None,
        "attn.recompute_mask": True,
        "attn.should_compress_indices": True,
        "attn.full_attn_from_3d_tail": None,
        "attn.full_attn_to_3d_tail": True,
        "attn.should_keep_tail_dense": False,
        "attn.delta_cache": True,
        "attn.coverage": None,
        "offloading.global_disable_offloading": False,
        "offloading.text_encoders": False,
        "offloading.attn.out_cache": True,
        "offloading.attn.indices": True,
        "offloading.mlp.out_cache": False,
        "offloading.mlp.indices": False,
        "offloading.mlp.sparse_act_T": False,
        "step_caching.is_enabled": False,
        "step_caching.skip_step_schedule": (
            *(7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43),
        ),
        "tea_cache.is_enabled": False,
        "token_cache.is_enabled": False,
    }
)

# Settings of its kernels and of its bookkeeping: nothing in the result depends on them.
WITHOUT_EFFECT = frozenset(
    {
        *("model_name", "should_profile", "generation_index"),
        *("mlp.counts_multiple_of", "mlp.bm", "mlp.mbm", "mlp.provider"),
        *("attn.counts_multiple_of", "attn.bm", "attn.mbm", "attn.provider"),
        *("attn.pad_qkv_before_kernel", "attn.debug"),
        *("offloading.attn.counts", "offloading.attn.lse_constants"),
        *("offloading.mlp.counts", "offloading.mlp.blockmean_mid_cache"),
    }
)

_ORIGINAL_TOP = frozenset(name.partition(".")[0] for name in (*ORIGINAL, *WITHOUT_EFFECT)) - {"mlp"}
_ORIGINAL_MLP = frozenset(name[4:] for name in (*ORIGINAL, *WITHOUT_EFFECT) if name.startswith("mlp."))

_FLAGS = tuple(name for name, default in ORIGINAL.items() if isinstance(default, bool))

# Where a value has to be just this one to mean what we do.
_ONLY: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "world_size": (1, "one device"),
        "attn.full_attn_to_3d_tail": (True, "text columns are always taken"),
        "attn.delta_cache": (True, "the rest of the attention always comes from the cache"),
        "attn.coverage": (None, "the number of columns is fixed by top_keys"),
        "offloading.text_encoders": (False, "only caches are moved; place text encoders in the pipeline"),
        "tea_cache.is_enabled": (False, "skipped steps are listed in step_caching"),
        "token_cache.is_enabled": (False, "all tokens are computed"),
    }
)


def is_original(content: Mapping[str, Any], ours: Iterable[str], path: str) -> bool:
    """Whether a file is in the original's format, told by the top-level names; `ours` are those of our format."""
    top = {str(name).partition(".")[0] for name in content}
    theirs, own = sorted(top & _ORIGINAL_TOP), sorted(top & (set(ours) - {"mlp"}))
    if theirs and own:
        raise ConfigError.unreadable(
            path, f"it mixes two formats, the original's ({', '.join(theirs)}) and ours ({', '.join(own)})"
        )
    mlp = content.get("mlp")
    return bool(theirs) or (not own and isinstance(mlp, dict) and bool(_ORIGINAL_MLP.intersection(map(str, mlp))))


def translate(content: Mapping[str, Any], path: str) -> tuple[dict[str, Setting], str | None]:
    """Our settings for a file in the original's format, and one warning that names what they cannot say."""
    given = dict(_flat(content))
    original = _Original(given, path)
    settings = dict(original.settings())
    parts = []
    if losses := [f"{key} = {given.get(key)!r} ({why})" for key, why in original.losses()]:
        parts.append(f"Not honoured: {'; '.join(losses)}")
    if idle := sorted(WITHOUT_EFFECT.intersection(given)):
        parts.append(f"Without effect here: {', '.join(idle)}")
    return settings, f"{path}: {'. '.join(parts)}." if parts else None


@dataclass(frozen=True)
class _Original:
    """A file in the original's format, by dotted names."""

    given: Mapping[str, Any]
    path: str

    def __post_init__(self) -> None:
        for key in _FLAGS:
            if not isinstance(self[key], bool):
                raise ConfigError.invalid(key, self[key], "true or false", source=self.path)

    def __getitem__(self, key: str) -> Any:
        return self.given.get(key, ORIGINAL[key])

    def settings(self) -> Iterator[tuple[str, Setting]]:
        yield "attention.enabled", self._setting("attn.is_enabled")
        yield "attention.density", self._share("attn.top_keys")
        yield "attention.random_density", self._setting("attn.random_keys", self._random_share())
        yield "attention.local_voxels", self._setting("attn.local_voxels")
        yield "attention.local_window", self._setting("attn.local_1d_window")
        yield "attention.renew_lists", self._setting("attn.recompute_mask")
        yield "attention.dense_layers", self._setting("attn.first_n_dense_layers")
        yield "attention.text_rows", self._setting("attn.full_attn_from_3d_tail", self._text_rows())
        yield "mlp.enabled", self._setting("mlp.is_enabled")
        yield "mlp.density", self._share("mlp.top_keys")
        yield "mlp.random_density", self._setting("mlp.random_keys")
        yield "mlp.list_lifetime", self._setting("mlp.block_mask_cache")
        yield "mlp.fp8", self._setting("mlp.is_fp8")
        yield "mlp.dense_layers", self._setting("mlp.first_n_dense_layers")
        yield "schedule.refresh_every", self._setting(f"{self._clock()}.full_step_every")
        if self["attn.is_enabled"]:
            yield "schedule.refresh_steps", self._setting("attn.full_step_schedule")
        skips = self["step_caching.skip_step_schedule"] if self["step_caching.is_enabled"] else None
        yield "schedule.skip_steps", self._setting("step_caching.skip_step_schedule", skips)
        yield "schedule.steps", self._setting("steps")
        yield "schedule.branches", self._setting("num_model_invocations_per_inference_step")
        yield "tokens.order", self._setting("patchify.is_enabled", "auto" if self._patches() else "raster")
        yield "memory.offload", self._setting("offloading", "all" if any(self._offloaded().values()) else "none")

    def losses(self) -> Iterator[tuple[str, str]]:
        """What has a meaning that our settings cannot give it, each with what is done instead."""
        for key, (only, instead) in _ONLY.items():
            kind = key.partition(".")[0]
            if self[key] != only and (kind not in ("attn", "mlp") or kind in self._kinds()):
                yield key, instead
        for kind in self._kinds():
            if _is_zero(self[f"{kind}.top_keys"]):
                yield f"{kind}.top_keys", "at least one column is taken"
        if self._clock() == "attn" and self["mlp.is_enabled"]:
            if self["attn.full_step_schedule"] is not None:
                yield "mlp.full_step_every", "one schedule serves both: that of attn.full_step_schedule"
            elif self["mlp.full_step_every"] != self["attn.full_step_every"]:
                yield "mlp.full_step_every", "one schedule serves both: that of attn.full_step_every"
        for key, size in (("patchify.chunk_size_1", 8), ("patchify.chunk_size_2", 4)):
            if self._patches() and self[key] != size:
                yield key, "the size of patches is chosen from the grid"
        if any(self._offloaded().values()):
            for key in self._offloaded():
                if self.given.get(key) is False:
                    yield key, "caches move together"
        for key in self.given:
            if key not in ORIGINAL and key not in WITHOUT_EFFECT and not key.startswith(("tea_cache.", "token_cache.")):
                yield key, "unknown"

    def _setting(self, key: str, value: Any = ...) -> Setting:
        return Setting(self[key] if value is ... else value, key, self.path)

    def _share(self, key: str) -> Setting:
        # Nothing but local, text and random columns: our smallest share is one column.
        return Setting(1e-6 if _is_zero(self[key]) else self[key], key, self.path)

    def _kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in ("attn", "mlp") if self[f"{kind}.is_enabled"])

    def _clock(self) -> str:
        return "mlp" if self._kinds() == ("mlp",) else "attn"

    def _random_share(self) -> Any:
        if self["attn.random_keys"] is not None:
            return self["attn.random_keys"]
        # Uncompressed lists are the top columns alone; random ones enter through the mask that is compressed.
        return 0.01 if self["attn.should_compress_indices"] else 0.0

    def _text_rows(self) -> str:
        named = self["attn.full_attn_from_3d_tail"]
        # The compressed mask gives text rows every column, unless the file says otherwise.
        full = self["attn.should_compress_indices"] if named is None else named
        return "dense" if full or self["attn.should_keep_tail_dense"] else "sparse"

    def _patches(self) -> bool:
        sizes = (self["patchify.chunk_size_1"], self["patchify.chunk_size_2"])
        return self["patchify.is_enabled"] and sizes != (1, 1)

    def _offloaded(self) -> dict[str, bool]:
        """Which caches of the sites in use the file keeps on the host."""
        if self["offloading.global_disable_offloading"]:
            return {}
        kinds = tuple(f"offloading.{kind}." for kind in self._kinds())
        return {key: self[key] for key in ORIGINAL if key.startswith(kinds)} if kinds else {}


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif not (prefix == "" and value is None):  # a section left empty
            yield f"{prefix}{name}", value
