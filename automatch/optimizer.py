"""`remap_optimizer_state`: every moment follows its parameter, although optimizers store them by position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from automatch.adapt import is_adapted
from automatch.apply import check_side
from automatch.errors import MappingError, TransformError
from automatch.mapping import KeyMapping, Match
from automatch.positions import NoUniqueOrder, first_key, place_keys
from automatch.specs import StateSpec, dtype_name, is_tensor, spec_of_model
from automatch.transforms import Copy, apply_transform

if TYPE_CHECKING:
    import torch
    from torch import nn

Groups = list[dict[str, Any]]
Entry = Mapping[str, Any]
_DROP = "begin with a new optimizer"
# Factored second moments (Adafactor's) have a row's or a column's shape, which says nothing of the parameter's.
_FACTORED = re.compile(r"(^|_)(row|col)")


class _Saved(NamedTuple):
    """What the old optimizer holds of one parameter: the number of its group, and its state, empty if it has none."""

    group: int
    entry: Entry


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
        mapping: what feeds each key of ``model``.
        optimizer: the new optimizer over the parameters of ``model``.
        model: the new model.
        names: the checkpoint key of every position, where it is known.

    Returns:
        A state for ``optimizer.load_state_dict``; parameters that nothing feeds, or whose shape was adapted, begin afresh.

    Raises:
        MappingError: the mapping is for another model, the positions cannot be told apart, groups differ in number or
            order, or a moment cannot follow a transform.
    """
    groups: Groups = list(state["param_groups"])
    new_groups = _named_groups(optimizer, model)
    check_side(mapping.target, spec_of_model(model), "model")
    if len(groups) != len(new_groups):
        raise MappingError(
            f"the saved optimizer has {len(groups)} parameter groups, the new one has {len(new_groups)}; "
            f"build the optimizer with the same groups, or {_DROP}"
        )
    saved = _saved_by_key(state, groups, new_groups, mapping, names)
    moved = _moved_groups(saved, new_groups, mapping)
    empty: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    kept = [
        _hyperparameters(old) | {name: group[name] for name in ("params", "param_names") if name in group}
        for old, group in zip(groups, empty, strict=True)
    ]
    return {"state": moved, "param_groups": kept}


def _moved_groups(saved: Mapping[str, _Saved], new_groups: list[list[str]], mapping: KeyMapping) -> dict[int, dict[str, Any]]:
    """The state of every position of the new optimizer that has one."""
    targets, sources = mapping.target.spec, mapping.source.spec
    matches = {first_key(targets, match.target): match for match in mapping.matches}
    moved: dict[int, dict[str, Any]] = {}
    index = 0
    for number, group in enumerate(new_groups):
        _check_group(number, group, matches, {key: found.group for key, found in saved.items()}, sources)
        for key in group:
            match = matches.get(key)
            if match is not None and not is_adapted(match.transform):
                found = [saved.get(first_key(sources, source)) for source in match.sources]
                entries: list[Entry] = [{} if one is None else one.entry for one in found]
                if any(entries):
                    moved[index] = _follow(match, entries, sources)
            index += 1
    return moved


def _check_group(
    number: int, group: Iterable[str], matches: Mapping[str, Match], old_groups: Mapping[str, int], sources: StateSpec | None
) -> None:
    """Hyperparameters are kept by the number of a group: its parameters must not all have been in another one."""
    feeding = [first_key(sources, source) for key in group if key in matches for source in matches[key].sources]
    before = {old_groups[source]: source for source in feeding if source in old_groups}
    if before and number not in before:
        other, source = next(iter(before.items()))
        raise MappingError(
            f"group {number} of the new optimizer holds what was in group {other} of the saved one ({source!r}); "
            f"build the optimizer with its groups in the old order, or {_DROP}"
        )


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


def _saved_by_key(
    state: Mapping[str, Any], groups: Groups, new_groups: list[list[str]], mapping: KeyMapping, names: Sequence[str] | None
) -> dict[str, _Saved]:
    """What the old optimizer holds, by checkpoint key."""
    entries: Mapping[Any, Entry] = state["state"]
    indices: list[list[Any]] = [list(group["params"]) for group in groups]
    flat = [_Saved(number, entries.get(index, {})) for number, group in enumerate(indices) for index in group]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and all(isinstance(index, str) for group in indices for index in group):
        names = [index for group in indices for index in group]
    if names is not None:
        return _saved_by_name(flat, names, mapping)
    found: dict[str, _Saved] = {}
    for number, new_group in enumerate(new_groups):
        group = [saved for saved in flat if saved.group == number]
        try:
            placed = place_keys(mapping, new_group, [_parameter_shape(saved.entry) for saved in group])
        except NoUniqueOrder as error:
            raise MappingError(
                f"cannot tell which parameter each position of group {number} of the saved optimizer belongs to ({error}); "
                "pass names=[the old model's parameter keys, in the optimizer's order]"
            ) from error
        found.update({key: group[position] for key, position in placed.items()})
    return found


def _saved_by_name(saved: list[_Saved], names: Sequence[str], mapping: KeyMapping) -> dict[str, _Saved]:
    if len(names) != len(saved):
        raise MappingError(f"names has {len(names)} keys, the saved optimizer holds {len(saved)} parameters")
    if not set(names) & {key for match in mapping.matches for key in match.sources} and mapping.matches:
        raise MappingError(
            f"the saved optimizer names parameters like {names[0]!r}, none of which the mapping uses; pass names=[checkpoint keys]"
        )
    spec = mapping.source.spec
    for name, one in zip(names, saved, strict=True):
        shape = _parameter_shape(one.entry)
        if spec is not None and name in spec and shape not in (None, spec[name].shape):
            raise MappingError(
                f"the saved optimizer's state for {name!r} has shape {shape}, the checkpoint's tensor {spec[name].shape}; "
                "are the names in the optimizer's order?"
            )
    return dict(zip(names, saved, strict=True))


def _parameter_shape(entry: Entry) -> tuple[int, ...] | None:
    """The shape of the parameter that an entry belongs to, as far as its moments agree on one."""
    shapes = {tuple(value.shape) for name, value in entry.items() if is_tensor(value) and value.ndim and not _FACTORED.search(name)}
    return shapes.pop() if len(shapes) == 1 else None


def _follow(match: Match, entries: Sequence[Entry], sources: StateSpec | None) -> dict[str, Any]:
    """The state of one target from those of its sources."""
    for source, entry in zip(match.sources, entries, strict=True):
        if entry.keys() != entries[0].keys():
            raise MappingError(
                f"{match.target!r} is made of several tensors, but the saved optimizer has other state for {source!r} "
                f"than for {match.sources[0]!r}; {_DROP}"
            )
    shapes = None if sources is None else [sources[source].shape for source in match.sources]
    return {name: _follow_value(match, name, [entry[name] for entry in entries], shapes) for name in entries[0]}


def _follow_value(match: Match, name: str, values: list[Any], shapes: list[tuple[int, ...]] | None) -> Any:
    if isinstance(match.transform, Copy):
        return values[0]
    if all(is_tensor(value) and value.ndim for value in values):
        return _transformed(match, name, values, shapes)
    numbers = [value.item() if is_tensor(value) else value for value in values]
    if any(number != numbers[0] for number in numbers):
        listed = ", ".join(map(str, numbers))
        raise MappingError(f"{match.target!r} is made of several tensors, whose optimizer state {name!r} differs ({listed}); {_DROP}")
    return values[0]


def _transformed(match: Match, name: str, values: list[Any], shapes: list[tuple[int, ...]] | None) -> torch.Tensor:
    """Values in the shape of the parameter, changed as the parameter is."""
    op = match.transform.op
    if not all(dtype_name(value.dtype).startswith(("float", "bfloat")) for value in values):
        dtype = dtype_name(values[0].dtype)
        raise MappingError(f"state {name!r} of {match.target!r} is {dtype} (packed?) and cannot follow {op!r}; {_DROP}")
    found = [tuple(value.shape) for value in values]
    if shapes is not None and found != shapes:
        raise MappingError(
            f"state {name!r} of {match.target!r} has shape {found[0]}, not the parameter's {shapes[0]}, and cannot follow {op!r}; {_DROP}"
        )
    try:
        return apply_transform(match.transform, values)
    except TransformError as error:
        raise MappingError(f"state {name!r} cannot follow {match.target!r}: {error}; {_DROP}") from error
