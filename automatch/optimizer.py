"""`remap_optimizer_state`: every moment follows its parameter, although optimizers store them by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.positions import NoUniqueOrder, first_key, place_keys
from automatch.specs import dtype_name, is_tensor
from automatch.transforms import Copy, apply_transform

if TYPE_CHECKING:
    import torch
    from torch import nn

Groups = list[dict[str, Any]]
_DROP = "begin with a new optimizer"


def remap_optimizer_state(
    state: Mapping[str, Any],
    mapping: KeyMapping,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Give an optimizer's saved state the order, names and shapes of another model's parameters.

    PyTorch stores moments by position. The checkpoint key of each position is taken from ``names``, from the names
    that the state holds itself, or else worked out: the parameters of a group are expected in the checkpoint's order,
    grouped as the new optimizer groups them, and every moment must have its parameter's shape.

    Args:
        state: the saved ``optimizer.state_dict()``; it is not changed.
        mapping: what feeds each model key.
        optimizer: the new optimizer over the parameters of ``model``.
        model: the new model.
        names: the checkpoint key of every position, where it is known.

    Returns:
        A state for ``optimizer.load_state_dict``; parameters that nothing feeds begin afresh.

    Raises:
        MappingError: the positions cannot be told apart, groups differ in number, or a moment cannot follow a transform.
    """
    groups: Groups = list(state["param_groups"])
    new_groups = _named_groups(optimizer, model)
    if len(groups) != len(new_groups):
        raise MappingError(
            f"the saved optimizer has {len(groups)} parameter groups, the new one has {len(new_groups)}; "
            f"build the optimizer with the same groups, or {_DROP}"
        )
    targets, sources = mapping.target.spec, mapping.source.spec
    matches = {first_key(targets, match.target): match for match in mapping.matches}
    of_key = _state_by_key(state, groups, new_groups, mapping, names)
    moved: dict[Any, dict[str, Any]] = {}
    for _, key, index in _positions(new_groups):
        match = matches.get(key)
        entries = [] if match is None else [of_key.get(first_key(sources, source), {}) for source in match.sources]
        if match is not None and any(entries):
            moved[index] = _follow(match, entries)
    empty: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    kept = [
        _hyperparameters(old) | {name: group[name] for name in ("params", "param_names") if name in group}
        for old, group in zip(groups, empty, strict=True)
    ]
    return {"state": moved, "param_groups": kept}


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _named_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The model key of every parameter of the optimizer, group by group."""
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    found: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        parameters: list[Any] = group["params"]
        if any(id(parameter) not in keys for parameter in parameters):
            raise MappingError(
                f"group {number} of the optimizer holds a tensor that is no parameter of {type(model).__name__}; pass the model it trains"
            )
        found.append([keys[id(parameter)] for parameter in parameters])
    return found


def _positions(groups: Sequence[Sequence[str]]) -> Iterator[tuple[int, str, int]]:
    index = 0
    for number, group in enumerate(groups):
        for key in group:
            yield number, key, index
            index += 1


def _state_by_key(
    state: Mapping[str, Any], groups: Groups, new_groups: list[list[str]], mapping: KeyMapping, names: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    """The saved state of every checkpoint key that has one."""
    entries: Mapping[Any, Mapping[str, Any]] = state["state"]
    indices: list[list[Any]] = [list(group["params"]) for group in groups]
    flat = [index for group in indices for index in group]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and all(isinstance(index, str) for index in flat):
        names = flat
    if names is not None:
        if len(names) != len(flat):
            raise MappingError(f"names has {len(names)} keys, the saved optimizer holds {len(flat)} parameters")
        if not set(names) & {key for match in mapping.matches for key in match.sources} and mapping.matches:
            raise MappingError(
                f"the saved optimizer names parameters like {names[0]!r}, none of which the mapping uses; pass names=[checkpoint keys]"
            )
        return {key: entries[index] for key, index in zip(names, flat, strict=True) if index in entries}
    found: dict[str, Mapping[str, Any]] = {}
    for number, (group, new_group) in enumerate(zip(indices, new_groups, strict=True)):
        shapes = [_parameter_shape(entries.get(index, {})) for index in group]
        try:
            placed = place_keys(mapping, new_group, shapes)
        except NoUniqueOrder as error:
            raise MappingError(
                f"cannot tell which parameter each position of group {number} of the saved optimizer belongs to ({error}); "
                "pass names=[the old model's parameter keys, in the optimizer's order]"
            ) from error
        found.update({key: entries[group[position]] for key, position in placed.items() if group[position] in entries})
    return found


def _parameter_shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the parameter that an entry belongs to, as far as its moments agree on one."""
    shapes = {tuple(value.shape) for value in entry.values() if is_tensor(value) and value.ndim}
    return shapes.pop() if len(shapes) == 1 else None


def _follow(match: Match, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one target from those of its sources."""
    for source, entry in zip(match.sources, entries, strict=True):
        if entry.keys() != entries[0].keys():
            raise MappingError(
                f"{match.target!r} is made of several tensors, but the saved optimizer has other state for {source!r} "
                f"than for {match.sources[0]!r}; {_DROP}"
            )
    return {name: _follow_value(match, name, [entry[name] for entry in entries]) for name in entries[0]}


def _follow_value(match: Match, name: str, values: list[Any]) -> Any:
    if isinstance(match.transform, Copy):
        return values[0]
    if all(is_tensor(value) and value.ndim for value in values):
        if not all(dtype_name(value.dtype).startswith(("float", "bfloat")) for value in values):
            dtype = dtype_name(values[0].dtype)
            raise MappingError(f"state {name!r} of {match.target!r} is {dtype} (packed?) and cannot follow {match.transform.op!r}; {_DROP}")
        try:
            return apply_transform(match.transform, values)
        except TransformError as error:
            raise MappingError(f"state {name!r} cannot follow {match.target!r}: {error}; {_DROP}") from error
    numbers = [value.item() if is_tensor(value) else value for value in values]
    if any(number != numbers[0] for number in numbers):
        listed = ", ".join(map(str, numbers))
        raise MappingError(f"{match.target!r} is made of several tensors, whose optimizer state {name!r} differs ({listed}); {_DROP}")
    return values[0]
