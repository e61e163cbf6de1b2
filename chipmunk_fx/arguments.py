"""Words of the command line that several commands take: sizes, settings, and where a model comes from."""

import inspect
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from math import inf
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from chipmunk_fx.errors import UsageError


def size_of(text: str) -> tuple[int, ...]:
    """HxW or HxWxF."""
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise ArgumentTypeError(
            f"{text!r} is not HxW or HxWxF in pixels and frames, for example 768x1280 or 480x848x85"
        )
    return tuple(int(part) for part in parts)


def count_of(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share_of(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ArgumentTypeError(f"{text!r} is not a share: a number above 0 and at most 1")
    return share


def seconds_of(text: str) -> float:
    """A number of seconds, at least 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds: a number of at least 0")
    return seconds


def device_of(text: str) -> str:
    """The name of a device that is there."""
    try:
        torch.empty(1, device=text).item()  # which "meta" cannot
    except (RuntimeError, AssertionError) as cause:  # an assertion: torch was built without CUDA
        problem = str(cause).partition("\n")[0]
        raise ArgumentTypeError(f"{text!r} is no device here ({problem}); try 'cpu' or 'cuda'") from cause
    return text


def option_of(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is read as YAML, so that numbers, true, null and lists are what they look like."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option {text!r} has no '='; write it as NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as cause:
        raise UsageError(f"--option {text!r}: {value!r} is not YAML ({' '.join(str(cause).split())})") from cause


def made_by(path: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model and the keyword inputs that MODULE:FACTORY returns."""
    factory = factory_at(path)
    if needed := _needed(factory):
        raise UsageError(f"{path} is called without arguments and needs {needed}")
    match factory():
        case (nn.Module() as model, Mapping() as inputs):
            return model, inputs
        case (*parts,):
            returned = f"({', '.join(type(part).__name__ for part in parts)})"
        case other:
            returned = f"a {type(other).__name__}"
    raise UsageError(f"{path} returned {returned}; it should return (model, keyword inputs): a module and a mapping")


def factory_at(path: str) -> Any:
    """The function that MODULE:FACTORY names, of a module in the current folder or an installed one."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"{path!r} is not of the form MODULE:FACTORY, for example my_models:flux")
    top = module_name.partition(".")[0]
    if not (_import_from_here(top) or find_spec(top)):
        raise UsageError(f"no module {top!r} among the installed ones or in {Path.cwd()}")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as cause:
        if not cause.name or not module_name.startswith(cause.name):
            raise
        raise UsageError(f"no module {cause.name!r}") from cause
    if not callable(factory := getattr(module, name, None)):
        raise UsageError(f"{module_name} has no function {name!r}")
    return factory


def _needed(factory: Callable[..., Any]) -> str:
    """The arguments that `factory` cannot be called without, as far as it tells."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # of some built-in functions
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in optional)


def _import_from_here(top: str) -> bool:
    """Import a module of the current folder, where a console script does not look. What it imports is looked for there
    last: what else lies there may bear the name of an installed library."""
    here = str(Path.cwd())
    spec = PathFinder.find_spec(top, [here])
    if spec is None or top in sys.modules:
        return top in sys.modules
    if here not in sys.path:
        sys.path.append(here)
    module = sys.modules[top] = module_from_spec(spec)
    if spec.loader:  # a folder without __init__.py has none
        spec.loader.exec_module(module)
    return True
