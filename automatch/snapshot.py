"""What the next person needs to know of a model, stored inside its checkpoint: layout, sources, versions, a golden batch.

A snapshot is a dict of short texts: `torch.load(weights_only=True)` reads it, other tools pass over it, and reading it
executes nothing. Tensors of the golden batch are kept in the safetensors format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from automatch import packing
from automatch.errors import CheckpointError
from automatch.golden import Golden, record_golden
from automatch.readers import open_checkpoint
from automatch.specs import StateSpec, TensorSpec, spec_of_model

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY, FORMAT, VERSION = "automatch_snapshot", "automatch-snapshot", 1
_MAX_SOURCE_BYTES = 600_000


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was read.

    Args:
        model: full name of the model's class.
        spec: the model's layout, with owner classes and aliases.
        optimizers: the parameter keys of each optimizer, in its order.
        sources: the model's source files, by path inside their package.
        commit: the git commit they were at, with ``+`` if there were changes, or None.
        versions: library versions.
        golden: inputs and outputs in eval mode, or None.
    """

    model: str
    spec: StateSpec
    optimizers: tuple[tuple[str, ...], ...]
    sources: dict[str, str]
    commit: str | None
    versions: dict[str, str]
    golden: Golden | None


def snapshot(
    model: nn.Module, *, sample: Any = None, optimizers: tuple[torch.optim.Optimizer, ...] | list[torch.optim.Optimizer] = ()
) -> dict[str, Any]:
    """Describe a model for whoever loads its checkpoint later; put it into the checkpoint under ``"automatch_snapshot"``.

    Args:
        model: the model; it is not changed.
        sample: a small batch to keep with the model's output in eval mode: a tensor, a tuple of positional or a dict
            of keyword arguments.
        optimizers: optimizers whose parameter order is kept.
    """
    from automatch.provenance import git_commit, library_versions, own_classes, own_sources

    spec = spec_of_model(model)
    classes = own_classes(model)
    kind = type(getattr(model, "_orig_mod", model))  # not torch.compile's wrapper
    layout = {
        "entries": [[t.key, list(t.shape), t.dtype, t.kind, t.owner, t.alias_of] for t in spec],
        "modules": [list(module) for module in spec.modules],
        "optimizers": [_parameter_order(optimizer, model) for optimizer in optimizers],
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "commit": git_commit(classes),
        "versions": library_versions(model),
        "layout": packing.pack(layout),
        "sources": packing.pack(own_sources(classes, _MAX_SOURCE_BYTES)),
        "golden": None if sample is None else record_golden(model, sample).pack(),
    }


def save_snapshot(
    model: nn.Module,
    path: str | Path,
    *,
    sample: Any = None,
    optimizers: tuple[torch.optim.Optimizer, ...] | list[torch.optim.Optimizer] = (),
) -> Path:
    """Write ``model``'s snapshot into the checkpoint at ``path``, or a new checkpoint with its weights if there is none.

    Args:
        model: the model.
        path: a file that `torch.save` wrote (a dict), or a new file.
        sample: a small batch, as for `snapshot`.
        optimizers: optimizers whose parameter order is kept, in the checkpoint's order.

    Raises:
        CheckpointError: the file is no dict that `torch.save` wrote and `torch.load(weights_only=True)` reads; it is left as it was.
    """
    import io

    import torch

    from automatch.files import write_atomically

    path = Path(path)
    content = _content_of(path) if path.exists() else {"state_dict": model.state_dict()}
    found = snapshot(model, sample=sample, optimizers=optimizers)
    if all(isinstance(value, torch.Tensor) for value in content.values()):  # a bare state_dict stays one, for load_state_dict
        metadata = getattr(content, "_metadata", {})
        content = OrderedDict(content)
        content._metadata = OrderedDict(metadata) | {KEY: found}  # type: ignore[attr-defined]
    else:
        content = {**content, KEY: found}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


def _content_of(path: Path) -> dict[str, Any]:
    import torch

    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and start[:2] != b"PK":  # torch.load reads safetensors too, which a pickle must not replace
        raise CheckpointError(f"cannot add a snapshot to {str(path)!r}: it is a safetensors file; keep the snapshot in a file of its own")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot add a snapshot to {str(path)!r}: {error}") from error
    if not isinstance(content, dict) or any(not isinstance(key, str) for key in content):
        raise CheckpointError(f"cannot add a snapshot to {str(path)!r}: it holds no dict of names")
    return cast("dict[str, Any]", content)


def read_snapshot(ckpt: Any, *, trust: bool = False) -> Snapshot | None:
    """The snapshot inside a checkpoint (a path, or a loaded dict), or None if there is none; nothing is executed.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its snapshot is damaged.
    """
    if isinstance(ckpt, Mapping):
        raw = _raw_in(ckpt, vars(ckpt) if isinstance(ckpt, OrderedDict) else None)
    else:
        with open_checkpoint(ckpt, trust=trust) as checkpoint:
            tree: Any = getattr(checkpoint, "tree", None)
            tree = getattr(tree, "root", tree)
            raw = _raw_in(tree, getattr(tree, "attributes", None))
    if raw is None:
        return None
    try:
        return _snapshot_from(raw)
    except Exception as error:  # whatever stands where a text or a number is expected
        raise CheckpointError(f"the snapshot in the checkpoint is damaged: {type(error).__name__}: {error}") from error


def _raw_in(tree: Any, attributes: Any) -> Any:
    """The snapshot among the entries of a checkpoint, or in the ``_metadata`` of a bare state_dict."""
    places = (tree, cast("Mapping[str, Any]", attributes).get("_metadata") if isinstance(attributes, Mapping) else None)
    return next((place[KEY] for place in places if isinstance(place, Mapping) and KEY in place), None)


def _snapshot_from(raw: Any) -> Snapshot:
    if not isinstance(raw, Mapping):
        raise TypeError(f"it is a {type(raw).__name__}, not a dict")
    if raw["format"] != FORMAT or raw["version"] != VERSION:
        raise ValueError(f"format {raw['format']!r} version {raw['version']!r}; this automatch reads version {VERSION}")
    layout = packing.unpack(raw["layout"])
    tensors = tuple(TensorSpec(key, tuple(shape), dtype, kind, alias, owner) for key, shape, dtype, kind, owner, alias in layout["entries"])
    spec = StateSpec(tensors, origin=str(raw["model"]), modules=tuple((str(path), str(name)) for path, name in layout["modules"]))
    golden = raw["golden"]
    return Snapshot(
        model=str(raw["model"]),
        spec=spec,
        optimizers=tuple(tuple(map(str, keys)) for keys in layout["optimizers"]),
        sources={str(path): str(text) for path, text in packing.unpack(raw["sources"]).items()},
        commit=None if raw["commit"] is None else str(raw["commit"]),
        versions={str(name): str(version) for name, version in raw["versions"].items()},
        golden=None if golden is None else Golden.unpack(golden),
    )


def _parameter_order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    return [keys.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]
