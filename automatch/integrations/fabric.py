"""Lightning Fabric's `load`, with the keys of the module mapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from automatch.apply import open_source
from automatch.errors import LoadError
from automatch.load import values_of
from automatch.mapping import CONFIDENT
from automatch.optimizer import remap_optimizer_state
from automatch.planning import LoadPlan, MappingLike, plan_load
from automatch.training import remap_copies

if TYPE_CHECKING:
    from torch import nn

    from automatch.matching import Pins

Objects = dict[str, Any]


def fabric_load(
    fabric: Any,
    path: Any,
    state: Objects,
    strict: bool = True,
    *,
    mapping: MappingLike | None = None,
    threshold: float = CONFIDENT,
    pins: Pins | None = None,
    adapt: Mapping[str, str] | None = None,
    weights_only: bool | None = None,
) -> Objects:
    """What ``fabric.load(path, state)`` does, with the keys of the module in ``state`` mapped, all or nothing.

    Args:
        fabric: the ``Fabric``.
        path: the checkpoint.
        state: the objects to restore, by their names in the checkpoint: a module, copies of it (an `AveragedModel`), other
            modules whose keys are as they were, their optimizers, anything else.
        strict: refuse when a parameter would keep its initial value, or a name is not in the checkpoint.
        mapping: a reviewed mapping (or its file); without it one is proposed.
        threshold: matches are loaded from this confidence on, in [0, 1].
        pins: pairs that a person has decided.
        adapt: shape adaptations by key pattern.
        weights_only: as in Fabric; None leaves it to Fabric.

    Returns:
        What is left of the checkpoint.

    Raises:
        LoadError: loading was refused, or an object did not take its state; nothing in ``state`` has changed.
        MappingError: the state of an optimizer cannot follow; nothing in ``state`` has changed.
    """
    checkpoint: Objects = fabric.load(path) if weights_only is None else fabric.load(path, weights_only=weights_only)
    absent = [name for name in state if name not in checkpoint]
    if strict and absent:
        raise LoadError(f"{', '.join(map(repr, absent))} is not in the checkpoint, which holds {', '.join(map(repr, checkpoint))}")
    modules = _modules_of(state, checkpoint)
    first, model = next(iter(modules.items()))
    plan = plan_load(model, checkpoint[first], mapping=mapping, threshold=threshold, strict=strict, pins=pins, adapt=adapt)
    with open_source(plan.whole, checkpoint[first]) as opened:
        values = {first: values_of(plan, model.state_dict(keep_vars=True), opened)}
    rest: Objects = remap_copies({name: value for name, value in checkpoint.items() if name != first}, plan.chosen, model)
    values |= {name: _fitting(name, module, rest[name], model) for name, module in modules.items() if name != first}
    others = {name: value for name, value in state.items() if name in rest and name not in modules}
    mapped = {name: module for name, module in modules.items() if name == first or rest[name] is not checkpoint[name]}
    _hand_over(modules, values, others, {name: _state_for(value, rest[name], plan, modules, mapped) for name, value in others.items()})
    state.update({name: rest[name] for name, value in others.items() if not hasattr(value, "load_state_dict")})
    return {name: value for name, value in rest.items() if name not in state}


def _modules_of(state: Objects, checkpoint: Objects) -> dict[str, nn.Module]:
    """The modules that the checkpoint knows, without wrappers; the one whose keys are mapped comes first."""
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    found = {name: _unwrapped(value) for name, value in state.items() if isinstance(value, nn.Module) and name in checkpoint}
    if not found:
        raise LoadError(f"no module in state is in the checkpoint, which holds {', '.join(map(repr, checkpoint))}")
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1], AveragedModel)))


def _fitting(name: str, module: nn.Module, state: Any, model: nn.Module) -> dict[str, Any]:
    """The state of a further module, which must fit as it is, or as a copy of the first one."""
    current = module.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items() if hasattr(value, "shape")} if isinstance(state, Mapping) else {}
    if shapes != {key: tuple(value.shape) for key, value in current.items()}:
        raise LoadError(
            f"the checkpoint's keys and shapes for {name!r} are not those of the {type(module).__name__} in state, nor a copy of the "
            f"{type(model).__name__}; load each module with a fabric_load of its own, together with its optimizers"
        )
    return dict(state)


def _state_for(value: Any, saved: Any, plan: LoadPlan, modules: Mapping[str, nn.Module], mapped: Mapping[str, nn.Module]) -> Any:
    """What an object that is no module is given: the state of an optimizer follows the parameters that it trains."""
    if not hasattr(value, "param_groups"):
        return saved
    optimizer = _unwrapped(value)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trains = [name for name, module in modules.items() if trained <= {id(p) for p in module.parameters()}]
    name = trains[0] if trains else next(iter(modules))
    return remap_optimizer_state(saved, plan.chosen, optimizer, mapped[name]) if name in mapped else saved


def _hand_over(modules: Mapping[str, nn.Module], values: Mapping[str, Any], others: Objects, states: Objects) -> None:
    """Give every object its state; when one refuses it, those before it are put back."""
    from automatch.atomic import replace_values

    with _undone_on_failure() as undo:
        for name, value in others.items():
            if hasattr(value, "load_state_dict"):
                undo[name] = partial(value.load_state_dict, copy.deepcopy(value.state_dict()))
                _give(name, value, states[name])
        first, *copies = modules
        for name in copies:
            before = copy.deepcopy(modules[name].state_dict())
            replace_values(modules[name], values[name])
            undo[name] = partial(replace_values, modules[name], before)
        replace_values(modules[first], values[first])  # last: all or nothing by itself, without a second copy of its weights


@contextmanager
def _undone_on_failure() -> Generator[dict[str, Callable[[], Any]]]:
    """A table of what puts each object back, called from its end if the block fails."""
    undo: dict[str, Callable[[], Any]] = {}
    try:
        yield undo
    except BaseException as error:
        for name, put_back in reversed(undo.items()):
            try:
                put_back()
            except Exception as second:
                error.add_note(f"{name!r} did not take its own old state either and may have changed: {second}")
        raise


def _give(name: str, value: Any, state: Any) -> None:
    try:
        value.load_state_dict(state)
    except Exception as error:
        raise LoadError(f"{name!r} did not take its state, nothing in state has changed: {type(error).__name__}: {error}") from error


def _unwrapped(value: Any) -> Any:
    """The object inside Fabric's wrappers (and `torch.compile`'s)."""
    kinds = {kind.__name__ for kind in type(value).__mro__}
    if not kinds & {"_FabricModule", "_FabricOptimizer", "OptimizedModule"}:
        return value
    return next((_unwrapped(getattr(value, name)) for name in ("_orig_mod", "module", "optimizer") if hasattr(value, name)), value)
