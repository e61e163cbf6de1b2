"""Settings: one frozen dataclass a subject, filled from defaults, a preset, a config file and options, in this order.

Every setting, its default and its range stand here once; errors, YAML and options all read them from these classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

import yaml

from chipmunk_fx.config_rules import (
    FLAG,
    GRID,
    STEPS,
    TEXT,
    Section,
    absent_or,
    amount,
    choice,
    integer,
    layers,
    multiple,
    option,
    rules,
    share,
    word_or,
)
from chipmunk_fx.config_yaml import Setting, is_original, read_yaml, translate
from chipmunk_fx.errors import ConfigError
from chipmunk_fx.log import logger
from chipmunk_fx.presets import PRESETS
from chipmunk_fx.schedule import beyond

_GROUP = word_or("auto", multiple(16))


class SiteSection(Section):
    """What attention and MLPs have in common."""

    layers: tuple[tuple[int, int, float | Literal["dense"]], ...]
    density: float
    dense_layers: int

    def of_layer(self, layer: int | None) -> float | Literal["dense"] | None:
        """What `layers` says of a block, None where it names it not."""
        for first, last, said in self.layers:
            if layer is not None and first <= layer <= last:
                return said
        return None

    def is_dense(self, layer: int | None) -> bool:
        """Whether a block stays dense by `layers` or, where these do not name it, by `dense_layers`."""
        said = self.of_layer(layer)
        return said == "dense" if said is not None else layer is not None and layer < self.dense_layers

    def density_of(self, layer: int | None) -> float:
        """The density in a block that is not dense."""
        said = self.of_layer(layer)
        return said if isinstance(said, float) else self.density


@dataclass(frozen=True)
class AttentionConfig(SiteSection):
    """Self and joint attention: which columns of keys a group of rows computes on a sparse step."""

    prefix: ClassVar[str] = "attention."

    enabled: bool = option(True, FLAG)
    density: float = option(0.165, share(zero=False))
    random_density: float = option(0.01, share(zero=True))
    combine: Literal["scaled", "additive"] = option("scaled", choice("scaled", "additive"))
    mass_stride: int = option(4, integer(1))
    renew_lists: bool = option(True, FLAG)  # at every refresh; else once a generation
    text_rows: Literal["sparse", "dense"] = option("sparse", choice("sparse", "dense"))
    local_window: float = option(0.0, share(zero=True))
    local_voxels: int = option(0, integer(0))
    group_rows: int | Literal["auto"] = option("auto", _GROUP)
    dense_layers: int = option(2, integer(0))
    layers: tuple[tuple[int, int, float | Literal["dense"]], ...] = option((), layers())

    @property
    def local_columns(self) -> bool:
        """Groups always compute columns of their own, some more than others."""
        return self.local_window > 0 or self.local_voxels > 0


@dataclass(frozen=True)
class MlpConfig(SiteSection):
    """MLPs: which hidden neurons a group of rows computes on a sparse step."""

    prefix: ClassVar[str] = "mlp."

    enabled: bool = option(True, FLAG)
    density: float = option(0.30, share(zero=False))
    random_density: float = option(0.05, share(zero=True))
    list_lifetime: int = option(2, integer(1))
    fp8: bool = option(False, FLAG)  # the products of a sparse step, where the device has it
    group_rows: int | Literal["auto"] = option("auto", _GROUP)
    dense_layers: int = option(2, integer(0))
    layers: tuple[tuple[int, int, float | Literal["dense"]], ...] = option((), layers())


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """Which steps refresh the caches, which are skipped; how steps are counted where inputs do not tell."""

    prefix: ClassVar[str] = "schedule."

    refresh_every: int = option(10, integer(1))
    refresh_steps: tuple[int, ...] | None = option(None, absent_or("none", STEPS))
    dense_steps: tuple[int, ...] | None = option(None, absent_or("none", STEPS))
    skip_steps: tuple[int, ...] | None = option(None, absent_or("none", STEPS))
    skip_threshold: float | None = option(None, absent_or("none", amount()))
    steps: int | None = option(None, absent_or("inferred", integer(1)))
    branches: int | None = option(None, absent_or("inferred", integer(1)))


@dataclass(frozen=True)
class TokensConfig(Section):
    """Where tokens lie in the picture: `grid` is (t, h, w), `text` is (place, number of tokens)."""

    prefix: ClassVar[str] = "tokens."

    order: Literal["auto", "raster"] = option("auto", choice("auto", "raster"))
    grid: tuple[int, int, int] | Literal["auto"] = option("auto", word_or("auto", GRID))
    text: tuple[Literal["first", "last"], int] | Literal["auto"] = option("auto", word_or("auto", TEXT))


@dataclass(frozen=True)
class MemoryConfig(Section):
    """Where caches live and what they may take, in GB (10**9 bytes)."""

    prefix: ClassVar[str] = "memory."

    offload: Literal["none", "auto", "all"] = option("none", choice("none", "auto", "all", aliases=((None, "none"),)))
    budget_gb: float | Literal["auto"] = option("auto", word_or("auto", amount()))


@dataclass(frozen=True)
class Config(Section):
    """All settings. Equal settings are equal and hash alike, so a config can be part of a key.

    inductor: pairs (name, value) sorted by name, for Inductor's config; the name "mode" is torch.compile's `mode`.
    """

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    # YAML reads a bare off as false.
    gate: Literal["auto", "off"] = option("auto", choice("auto", "off", aliases=((False, "off"),)))
    lowering: Literal["inductor", "eager"] = option("inductor", choice("inductor", "eager"))
    strict: bool = option(False, FLAG)
    seed: int = option(0, integer(0, 2**63 - 1))
    inductor: tuple[tuple[str, Any], ...] = field(default=(), hash=False)  # values of Inductor's options may not hash

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.inductor.items() if isinstance(self.inductor, Mapping) else self.inductor
        checked = {name: _inductor_value(name, value) for name, value in given}
        if checked.get("mode", "") is None:
            del checked["mode"]
        object.__setattr__(self, "inductor", tuple(sorted(checked.items())))

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        *,
        warn: Callable[[str], Any] | None = None,
    ) -> Config:
        """The config of torch.compile's `options` and `mode`: defaults < preset < config file < other options.

        Keys are dotted names, or sections with mappings; "preset" and "config" (a path) choose what lies below.
        Raises ConfigError for a key or value that is not allowed. `warn` takes each warning (default: the log).
        """
        warn = warn or logger("plan").warning
        given = _settings({} if options is None else options, None)
        if mode is not None:
            given.setdefault("inductor.mode", Setting(mode, "mode"))
        path = given.pop("config", None)
        written: dict[str, Setting] = {}
        if path is not None:
            written, warning = _from_file(path.value)
            if warning:
                warn(warning)
        preset = given.pop("preset", None) or written.get("preset")
        written.pop("preset", None)
        config = cls._build({**_preset(preset), **written, **given})
        for warning in config._beyond():
            warn(warning)
        return config

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], *, warn: Callable[[str], Any] | None = None) -> Config:
        """The config of a file, in our format or the original's."""
        return cls.from_options({"config": path}, warn=warn)

    @property
    def inductor_mode(self) -> str | None:
        """What torch.compile's `mode` would be; None leaves Inductor as it is."""
        return dict(self.inductor).get("mode")

    @property
    def inductor_options(self) -> dict[str, Any]:
        """Options for Inductor's config, by the names it gives them."""
        return {name: copy.deepcopy(value) for name, value in self.inductor if name != "mode"}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings and lists; `from_options` makes an equal config of them."""
        return {
            **{item.name: _values(getattr(self, item.name)) for item in _sections()},
            **_values(self),
            "inductor": {name: copy.deepcopy(value) for name, value in self.inductor},
        }

    def to_yaml(self) -> str:
        """A config file in our format that says the same; ConfigError for an Inductor option that YAML cannot hold."""
        for name, value in self.inductor:
            try:
                yaml.safe_dump(value)
            except yaml.YAMLError:
                allowed = "in YAML, numbers, text, lists and mappings"
                raise ConfigError.invalid(f"inductor.{name}", value, allowed) from None
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def _build(cls, settings: Mapping[str, Setting]) -> Config:
        checks = _checks()
        values: dict[str, dict[str, Any]] = {item.name: {} for item in _sections()} | {"": {}, "inductor": {}}
        for name, setting in settings.items():
            section, _, last = name.rpartition(".")
            if name.startswith("inductor."):
                _, _, last = name.partition(".")
                values["inductor"][last] = _inductor_value(last, setting.value, setting.key, setting.source)
            elif name in checks:
                values[section][last] = checks[name].check(setting.key, setting.value, setting.source)
            else:
                raise ConfigError.unknown(setting.key, setting.value, allowed_keys(), source=setting.source)
        sections = {item.name: item.default_factory(**values[item.name]) for item in _sections()}  # type: ignore[misc]
        return cls(**sections, **values[""], inductor=tuple(values["inductor"].items()))

    def _beyond(self) -> Iterator[str]:
        for name in ("refresh_steps", "dense_steps", "skip_steps"):
            if unreached := beyond(self.schedule.steps, getattr(self.schedule, name)):
                yield (
                    f"schedule.{name} lists {', '.join(map(str, unreached))}, which a generation of schedule.steps = "
                    f"{self.schedule.steps} never reaches: steps count from 0, and lists are literal, never rescaled"
                )


def allowed_keys() -> tuple[str, ...]:
    """Every key that options take, except the names that follow "inductor."."""
    return (*_checks(), "preset", "config", "inductor.mode", "inductor.<name>")


def _sections() -> list[Any]:
    return [item for item in fields(Config) if item.default_factory is not MISSING]


def _checks() -> dict[str, Any]:
    """The rule of every dotted name."""
    nested = {f"{item.name}.{name}": rule for item in _sections() for name, rule in rules(item.default_factory).items()}
    return nested | rules(Config)


def _values(section: Section) -> dict[str, Any]:
    return {name: rule.plain(getattr(section, name)) for name, rule in rules(type(section)).items()}


def _settings(given: Any, source: str | None) -> dict[str, Setting]:
    """`given`, with dotted or nested keys, as settings by dotted name."""
    if not isinstance(given, Mapping):
        raise ConfigError.invalid("options", given, "a mapping from names of settings to values", source=source)
    found: dict[str, Setting] = {}
    for key, value in _flat(given, source):
        if key in found:
            raise ConfigError.invalid(key, value, f"one value; {found[key].value!r} is given too", source=source)
        found[key] = Setting(value, key, source)
    return found


def _flat(given: Mapping[Any, Any], source: str | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    nested = {"inductor", *(item.name for item in _sections())}
    for name, value in given.items():
        if not isinstance(name, str):
            raise ConfigError.unknown(str(name), value, allowed_keys(), source=source)
        key = prefix + name
        misspelt = not prefix and "." not in key and key not in allowed_keys()  # what is in it tells more
        deeper = misspelt or (prefix == "inductor." and not _is_inductor(name))
        if isinstance(value, Mapping) and (key in nested or (value and deeper)):
            yield from _flat(value, source, f"{key}.")
        elif key not in nested:
            yield key, value
        elif value is not None:  # a section left empty in YAML is None
            names = [known for known in allowed_keys() if known.startswith(f"{key}.")]
            raise ConfigError.invalid(key, value, f"a mapping of {', '.join(names)}", source=source)


def _from_file(path: Any) -> tuple[dict[str, Setting], str | None]:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError.invalid("config", path, "the path of a YAML file")
    shown = os.fspath(path)
    content = read_yaml(path)
    ours = [item.name for item in fields(Config)] + ["preset"]
    if is_original(content, ours, shown):
        return translate(content, shown)
    settings = _settings(content, shown)
    if "config" in settings:
        raise ConfigError.invalid("config", settings["config"].value, "no further file in a config file", source=shown)
    return settings, None


def _preset(setting: Setting | None) -> dict[str, Setting]:
    if setting is None:
        return {}
    name = choice(*PRESETS).check("preset", setting.value, setting.source)
    return {key: Setting(value, key, f"preset {name!r}") for key, value in PRESETS[name].items()}


def _is_inductor(name: str) -> bool:
    from torch._inductor import list_options  # imported where needed: settings are read without torch

    return name == "mode" or name in list_options()


def _inductor_value(name: str, value: Any, key: str | None = None, source: str | None = None) -> Any:
    """The value for `inductor.<name>`, copied; ConfigError unless Inductor knows the name and takes such a value."""
    from torch._inductor import config, list_mode_options, list_options

    key = key or f"inductor.{name}"
    if name == "mode":
        if value is None:  # torch.compile's own default
            return None
        return choice(*list_mode_options()).check(key, value, source)
    known = list_options()
    if name not in known:
        raise ConfigError.unknown(key, value, ("inductor.mode", *(f"inductor.{one}" for one in known)), source=source)
    expected = config.get_type(name)  # type: ignore[attr-defined]  # added when the module is installed
    if isinstance(expected, type) and not isinstance(value, expected):
        raise ConfigError.invalid(key, value, f"a value of type {expected.__name__}", source=source)
    return copy.deepcopy(value)
