"""Words of the command line that several commands take: sizes, settings, and where a model comes from."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import yaml

from chipmunk_fx.errors import UsageError


def size_of(text: str) -> tuple[int, ...]:
    """HxW or HxWxF; a ValueError is argparse's way to refuse it."""
    size = tuple(int(part) for part in text.split("x"))
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(text)
    return size


def option_of(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is read as YAML, so that numbers, true, null and lists are what they look like."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option {text!r} has no '='; write it as NAME=VALUE")
    return name, yaml.safe_load(value)


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


def _import_from_here(top: str) -> bool:
    """Import a module of the current folder, where a console script does not look. The folder is not added to
    sys.path: what else lies there may bear the name of an installed library."""
    spec = PathFinder.find_spec(top, [str(Path.cwd())])
    if spec is None or top in sys.modules:
        return top in sys.modules
    module = sys.modules[top] = module_from_spec(spec)
    if spec.loader:  # a folder without __init__.py has none
        spec.loader.exec_module(module)
    return True
