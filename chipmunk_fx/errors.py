"""The errors a user can meet: each says what was seen, what is allowed and what to do.

Messages are built by class methods, so that one kind of failure has one wording wherever it is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = [
    "ArgumentError",
    "BenchError",
    "ChipmunkError",
    "ConfigError",
    "FallbackError",
    "NotCompiledError",
    "UsageError",
    "closest",
]


class ChipmunkError(RuntimeError):
    """Base of everything chipmunk_fx raises on purpose."""


class UsageError(ChipmunkError, ValueError):
    """Words of a command line that argparse lets through and that still cannot be followed."""


class BenchError(ChipmunkError, ValueError):
    """Nothing that could be timed or drawn."""


class ConfigError(ChipmunkError, ValueError):
    """A setting that does not exist or has a value it cannot take.

    `key` is the dotted name, `value` what was given, `allowed` a sentence or the valid names.
    """

    def __init__(self, message: str, *, key: str | None = None, value: Any = None, allowed: str | tuple[str, ...] = ()):
        super().__init__(message)
        self.key = key
        self.value = value
        self.allowed = allowed

    @classmethod
    def unknown(cls, key: str, value: Any, names: Iterable[str], *, source: str | None = None) -> ConfigError:
        """`key` is none of `names`: the closest ones are named first, then all."""
        names = tuple(names)
        near = closest(key, names)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        message = f"{_where(source)}unknown key {key!r} (given {_shown(value)}). {hint}{_listed(names)}"
        return cls(message, key=key, value=value, allowed=names)

    @classmethod
    def invalid(cls, key: str, value: Any, allowed: str, *, source: str | None = None, hint: str = "") -> ConfigError:
        """`key` exists, but `value` is not what it takes."""
        message = _refused(key, value, allowed)
        return cls(f"{_where(source)}{message} {hint}".rstrip(), key=key, value=value, allowed=allowed)

    @classmethod
    def unlisted(cls, key: str, value: Any, names: Sequence[str], *, source: str | None = None) -> ConfigError:
        """`key` exists, but its `value` is none of `names`."""
        near = closest(value, names, count=1) if isinstance(value, str) else []
        hint = f"Did you mean {near[0]!r}?" if near else ""
        return cls.invalid(key, value, " or ".join(map(repr, names)), source=source, hint=hint)

    @classmethod
    def unreadable(cls, path: str, problem: str) -> ConfigError:
        """The file named by the option `config` cannot be used at all."""
        allowed = "a YAML file with settings of chipmunk_fx, or of the original Chipmunk"
        message = f"config file {path}: {problem}. Allowed: {allowed}, free of Python tags."
        return cls(message, key="config", value=path, allowed=allowed)


class NotCompiledError(ChipmunkError):
    """A module was asked about that this backend has not compiled."""

    @classmethod
    def of(cls, model: object) -> NotCompiledError:
        """`model`: what was passed to summary, reset or generation."""
        return cls(
            f"{type(model).__name__} holds nothing that was compiled with the backend 'chipmunk'. Allowed: {_MODULES}. "
            'Compile it first: torch.compile(model, backend="chipmunk"). Where a function that calls it was compiled, '
            "call that function once."
        )

    @classmethod
    def no_module(cls, model: object, parts: Sequence[str]) -> NotCompiledError:
        """`parts`: names of its attributes that are modules."""
        return cls(
            f"{type(model).__name__} is no module, and what was compiled is found through a module's parameters. "
            f'Allowed: {_MODULES}. Pass {_instead(parts)}, compiled by torch.compile(..., backend="chipmunk").'
        )


class ArgumentError(ChipmunkError, TypeError, ValueError):
    """An argument of one of the functions that look at a model is of a kind or a value that it cannot be."""

    @classmethod
    def of(cls, name: str, value: object, allowed: str) -> ArgumentError:
        return cls(_refused(name, value, allowed))

    @classmethod
    def no_module(cls, name: str, value: object, parts: Sequence[str]) -> ArgumentError:
        """`parts`: names of its attributes that are modules."""
        return cls.of(name, value, f"a module, or what torch.compile returned for one. Pass {_instead(parts)}")


class FallbackError(ChipmunkError):
    """Raised with strict=True where a site or a call would otherwise stay dense in silence."""

    @classmethod
    def of(cls, what: str, reason: str) -> FallbackError:
        """`what` stays dense (a site, a call, a graph) for `reason`."""
        return cls(
            f"{what} would run dense: {reason}. With strict=True a fallback is an error; give the missing setting, "
            "or set strict=False to run it dense."
        )


def closest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """At most `count` of `names` that `name` may have meant: near spellings, or the same last part of a dotted name."""
    names = list(names)
    spelled = get_close_matches(name, names, n=count, cutoff=0.6)
    last = name.rpartition(".")[2]
    related = [known for known in names if known.rpartition(".")[2] == last and known not in spelled]
    return (spelled + related)[:count]


_MODULES = "the module that torch.compile was called on, what it returned, or a parent of compiled blocks"


def _refused(name: str, value: object, allowed: str) -> str:
    return f"{name} = {_shown(value)} is not allowed. Allowed: {allowed}."


def _instead(parts: Sequence[str]) -> str:
    return f"one of its modules ({', '.join(parts)})" if parts else "the module itself"


def _where(source: str | None) -> str:
    return f"{source}: " if source else ""


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _listed(names: tuple[str, ...], limit: int = 60) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"Allowed: {', '.join(names[:limit])}{rest}."
