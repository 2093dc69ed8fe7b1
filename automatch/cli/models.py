"""How a command line names a model: ``package.module:factory``, ``file.py:Factory``, or another checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from automatch.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from automatch.specs import StateSpec

MODEL_HELP = (
    "The model: `package.module:factory`, `file.py:Factory` (a class or a function that returns it), or another "
    "checkpoint whose keys are the target. A factory is your own code and is run."
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--model`` and ``--kwargs`` to a command, as ``model`` and ``kwargs`` for `resolve_model`."""
    kwargs = click.option("--kwargs", metavar="JSON", default="{}", help="Arguments of the factory, e.g. '{\"classes\": 3}'.")
    return click.option("--model", "-m", required=True, metavar="MODEL", help=MODEL_HELP)(kwargs(command))


def is_factory(reference: str) -> bool:
    """Whether ``reference`` is written as a factory (which a bare ``file.py`` means to be) and is no checkpoint."""
    return reference.endswith(".py") or (":" in reference and not Path(reference).exists())


def resolve_model(reference: str, kwargs: str = "{}", *, meta: bool = True) -> nn.Module | StateSpec:
    """Find the model that ``reference`` names.

    Args:
        reference: ``package.module:factory``, ``file.py:Factory``, or the path of a checkpoint.
        kwargs: a JSON object, the factory's keyword arguments.
        meta: build on the meta device where the factory can, so that no weights are allocated.

    Raises:
        ModelError: there is no such module, file or factory, or the factory failed.
        CheckpointError: the checkpoint cannot be read.
    """
    arguments = _arguments(kwargs)
    if Path(reference).exists() and not is_factory(reference):
        from automatch import open_checkpoint

        with open_checkpoint(reference) as checkpoint:
            return checkpoint.spec
    return build_model(find_factory(reference), arguments, meta=meta)


def find_factory(reference: str) -> Callable[..., Any]:
    """Import the factory that ``package.module:factory`` or ``file.py:Factory`` names.

    Raises:
        ModelError: there is no such module, file or name in it.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name:
        raise ModelError(f"no model {reference!r}; name it as package.module:factory, file.py:Factory, or the path of a checkpoint")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_name(place)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        offered = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")) or "nothing"
        raise ModelError(f"{place} has no factory {name!r}; it offers {offered}")
    return found


def build_model(factory: Callable[..., Any], arguments: dict[str, Any], *, meta: bool = True) -> nn.Module:
    """Call a factory, on the meta device where it can.

    Raises:
        ModelError: the factory raised an exception, or did not return a module.
    """
    import torch

    name = getattr(factory, "__qualname__", repr(factory))
    model = None
    if meta:
        try:
            with torch.device("meta"):
                model = factory(**arguments)
        except Exception:  # some factories compute with their weights, which the meta device cannot: build it for real
            model = None
    if model is None:
        try:
            model = factory(**arguments)
        except Exception as error:
            raise ModelError(f"{name}(**{arguments}) failed with {type(error).__name__}: {error}; its arguments are --kwargs") from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--kwargs") from error
    if not isinstance(arguments, dict):
        raise click.BadParameter(f"{text!r} is not a JSON object", param_hint="--kwargs")
    return arguments


def _import_name(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script, unlike `python -m`, does not see the current folder
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except Exception as error:
        raise ModelError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    name = path.stem if path.stem not in sys.modules else f"automatch_model_{path.stem}"
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"no file {str(path)!r}; name a model as package.module:factory, file.py:Factory, or the path of a checkpoint")
    sys.path.insert(0, str(path.resolve().parent))
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"cannot import {str(path)!r}: {type(error).__name__}: {error}") from error
    return module
