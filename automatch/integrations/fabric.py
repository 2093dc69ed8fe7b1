"""Lightning Fabric's `load`, with the keys of the module mapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from automatch.apply import open_source
from automatch.errors import LoadError
from automatch.load import values_of
from automatch.mapping import CONFIDENT
from automatch.optimizer import remap_optimizer_state
from automatch.planning import MappingLike, plan_load
from automatch.training import remap_copies

if TYPE_CHECKING:
    from automatch.matching import Pins


def fabric_load(
    fabric: Any,
    path: Any,
    state: dict[str, Any],
    strict: bool = True,
    *,
    mapping: MappingLike | None = None,
    threshold: float = CONFIDENT,
    pins: Pins | None = None,
    adapt: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What ``fabric.load(path, state)`` does, with the keys of the one module in ``state`` mapped, all or nothing.

    Args:
        fabric: the ``Fabric``.
        path: the checkpoint.
        state: the objects to restore, by their names in the checkpoint; one module, its optimizers, anything else.
        strict: refuse when a parameter would keep its initial value, or a name is not in the checkpoint.
        mapping: a reviewed mapping (or its file); without it one is proposed.
        threshold: matches are loaded from this confidence on, in [0, 1].
        pins: pairs that a person has decided.
        adapt: shape adaptations by key pattern.

    Returns:
        What is left of the checkpoint.

    Raises:
        LoadError: loading was refused; nothing in ``state`` has changed.
    """
    from torch import nn

    from automatch.atomic import replace_values

    checkpoint: dict[str, Any] = fabric.load(path)
    absent = [name for name in state if name not in checkpoint]
    if strict and absent:
        raise LoadError(f"{', '.join(map(repr, absent))} is not in the checkpoint, which holds {', '.join(map(repr, checkpoint))}")
    names = [name for name, value in state.items() if isinstance(value, nn.Module) and name in checkpoint]
    if len(names) != 1:
        raise LoadError(f"state must hold one module that is in the checkpoint, it holds {len(names)}; load the others with fabric.load")
    model = _unwrapped(state[names[0]])
    plan = plan_load(model, checkpoint[names[0]], mapping=mapping, threshold=threshold, strict=strict, pins=pins, adapt=adapt)
    with open_source(plan.whole, checkpoint[names[0]]) as opened:
        values = values_of(plan, model.state_dict(keep_vars=True), opened)
    rest: dict[str, Any] = remap_copies({k: v for k, v in checkpoint.items() if k != names[0]}, plan.chosen, model)
    optimizers = {name: value for name, value in state.items() if hasattr(value, "param_groups") and name in rest}
    moved = {name: remap_optimizer_state(rest[name], plan.chosen, _unwrapped(value), model) for name, value in optimizers.items()}
    replace_values(model, values)
    for name, value in state.items():
        if name in moved:
            value.load_state_dict(moved[name])
        elif name in rest and hasattr(value, "load_state_dict"):
            value.load_state_dict(rest[name])
        elif name in rest:
            state[name] = rest[name]
    return {name: value for name, value in rest.items() if name not in state}


def _unwrapped(value: Any) -> Any:
    """The object inside Fabric's wrappers (and `torch.compile`'s)."""
    for name in ("_orig_mod", "module", "optimizer"):
        if type(value).__name__ in ("_FabricModule", "_FabricOptimizer", "OptimizedModule") and hasattr(value, name):
            return _unwrapped(getattr(value, name))
    return value
