"""chipmunk_fx: a torch.compile backend that makes Diffusion Transformers faster with dynamic column sparsity.

`torch.compile(model, backend="chipmunk")` needs no import of this package. The names below look at a compiled
model and steer it; each is loaded when it is first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipmunk_fx.backend import explain, generation, reset, summary
    from chipmunk_fx.config import Config
    from chipmunk_fx.errors import ArgumentError, ChipmunkError, ConfigError, FallbackError, NotCompiledError

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ChipmunkError",
    "Config",
    "ConfigError",
    "FallbackError",
    "NotCompiledError",
    "explain",
    "generation",
    "reset",
    "summary",
]

_HOMES = {
    "chipmunk_fx.backend": ("explain", "generation", "reset", "summary"),
    "chipmunk_fx.config": ("Config",),
    "chipmunk_fx.errors": ("ArgumentError", "ChipmunkError", "ConfigError", "FallbackError", "NotCompiledError"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
