"""Finding the weights in what a trainer saved: the mapping of tensors that fits the model best.

Every mapping of text to tensors, at any depth, is a candidate; so is everything below a mapping, joined
by dots, where weights are kept as a tree. Optimizer states never are. Without a model the largest wins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from automatch.errors import CheckpointError, UnsafeCheckpointError
from automatch.readers._limits import MAX_DEPTH, check_count, check_keys
from automatch.specs import StateSpec

JOINED = "*"
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "model", "net"))
_AVERAGED = re.compile(r"ema|average|avg|swa|shadow|teacher|momentum|target|slow")
_TRAINING = re.compile(r"optim|^opt$|sched|scaler|^amp$|^rng|rng_state|^loops$")
_MOMENTS = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "exp_inf", "step"))
_NEAR = 0.95


class Node(Protocol):
    """How to look into one kind of content: a pickle's tree, or loaded dicts."""

    @staticmethod
    def tensor(value: Any, key: str, origin: str) -> Any: ...

    @staticmethod
    def shape(tensor: Any) -> tuple[int, ...]: ...

    @staticmethod
    def mapping(value: Any) -> Mapping[Any, Any] | None: ...


@dataclass(slots=True)
class State:
    """The weights that were picked.

    Args:
        path: the dict keys that lead to them; a last ``"*"`` means everything below, joined by dots.
        tensors: the tensors by key, in file order.
        others: the entries beside them that are no tensors.
        nodes: what the tensors were found in, by key.
        attributes: what hangs on the mapping itself, such as a state_dict's ``_metadata``.
        notes: what a person should know of the choice.
    """

    path: tuple[str, ...]
    tensors: dict[str, Any]
    others: dict[str, Any]
    nodes: dict[str, Any] = field(default_factory=dict[str, Any])
    attributes: Any = None
    notes: tuple[str, ...] = ()

    @property
    def joined(self) -> bool:
        """Whether several mappings were joined."""
        return self.path[-1:] == (JOINED,)

    @property
    def averaged(self) -> bool:
        """Whether the path names an average of the weights rather than the weights."""
        return any(_AVERAGED.search(part.lower()) for part in self.path)


@dataclass(slots=True)
class _Found:
    states: list[State] = field(default_factory=list[State])
    parents: dict[tuple[str, ...], Mapping[Any, Any]] = field(default_factory=dict[tuple[str, ...], Mapping[Any, Any]])
    optimizers: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    odd_keys: list[Any] = field(default_factory=list[Any])


def pick_state(
    root: Any,
    node: type[Node],
    *,
    origin: str,
    like: StateSpec | None,
    wrapper: Sequence[str] | None,
    needs_code: tuple[str, ...] = (),
) -> State:
    """The weights in ``root`` that fit ``like`` best, or those at ``wrapper``.

    Raises:
        CheckpointError: there are none, or none at ``wrapper``.
        UnsafeCheckpointError: there are none, and the pickle has objects that only code can build.
    """
    found = _search(root, node, origin)
    if wrapper is not None:
        state = _at(found, tuple(wrapper), origin)
    elif not found.states:
        raise _nothing(root, node, found, origin, needs_code)
    elif like is not None and len(like):
        state = _best_fit(_choices(found), like, node)
    else:
        state = _largest(_choices(found), node)
    check_count(len(state.tensors), origin)
    check_keys(state.tensors, origin)
    return state


def _search(root: Any, node: type[Node], origin: str) -> _Found:
    found = _Found()
    if node.tensor(root, "", origin) is not None:
        return found
    queue: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    seen: set[int] = set()
    while queue:
        value, path = queue.pop()
        children = _children_of(value, node, origin)
        if id(value) in seen or len(path) > MAX_DEPTH or children is None:
            continue
        seen.add(id(value))
        training = "param_groups" in children or (path and _TRAINING.search(path[-1].lower()))
        tensors = {} if training else _tensors_of(children, node, origin)
        if training or _only_moments(tensors):
            found.optimizers.append(path)
            continue
        found.odd_keys += [key for key in tensors if not isinstance(key, str)]
        others = {key: child for key, child in children.items() if isinstance(key, str) and key not in tensors}
        _collect(children, {key: tensor for key, tensor in tensors.items() if isinstance(key, str)}, others, path, node, found)
        queue.extend((child, (*path, key)) for key, child in reversed(others.items()))
    return found


def _children_of(value: Any, node: type[Node], origin: str) -> Mapping[Any, Any] | None:
    mapping = node.mapping(value)
    if mapping is None and isinstance(value, list | tuple):
        items = enumerate(cast("Sequence[Any]", value)[:100])
        return {str(index): item for index, item in items if node.tensor(item, str(index), origin) is None}
    return mapping


def _tensors_of(children: Mapping[Any, Any], node: type[Node], origin: str) -> dict[Any, Any]:
    found = ((key, node.tensor(child, str(key), origin)) for key, child in children.items())
    return {key: tensor for key, tensor in found if tensor is not None}


def _collect(
    children: Mapping[Any, Any], tensors: dict[str, Any], others: dict[str, Any], path: tuple[str, ...], node: type[Node], found: _Found
) -> None:
    if tensors:
        nodes = {key: children[key] for key in tensors}
        found.states.append(State(path, tensors, others, nodes, getattr(children, "attributes", None)))
    if any(node.mapping(child) is not None for child in others.values()):
        found.parents[path] = children


def _only_moments(tensors: Mapping[Any, Any]) -> bool:
    return len(tensors) > 0 and sum(str(key).rpartition(".")[2] in _MOMENTS for key in tensors) > 0.9 * len(tensors)


def _joined(found: _Found) -> Iterable[State]:
    """For each mapping of mappings, everything below it as one set of weights."""
    below: dict[tuple[str, ...], list[State]] = {}
    for state in found.states:
        for length in range(len(state.path) + 1):
            below.setdefault(state.path[:length], []).append(state)
    for path in found.parents:
        tensors: dict[str, Any] = {}
        others: dict[str, Any] = {}
        nodes: dict[str, Any] = {}
        parts = below.get(path, [])
        for state in parts:
            prefix = "".join(f"{part}." for part in state.path[len(path) :])
            tensors |= {prefix + key: tensor for key, tensor in state.tensors.items()}
            others |= {prefix + key: other for key, other in state.others.items()}
            nodes |= {prefix + key: other for key, other in state.nodes.items()}
        if len(parts) > 1 and len(tensors) == sum(len(state.tensors) for state in parts):
            yield State((*path, JOINED), tensors, others, nodes)


def _choices(found: _Found) -> list[State]:
    """Every set of weights, and of those that join the same tensors the innermost."""
    innermost = {frozenset(map(id, s.tensors.values())): s for s in sorted(_joined(found), key=lambda s: len(s.path))}
    return [*found.states, *innermost.values()]


def _at(found: _Found, wrapper: tuple[str, ...], origin: str) -> State:
    for state in [*found.states, *_joined(found)]:
        if state.path == wrapper:
            return state
    listed = ", ".join(_show(state.path) for state in found.states[:10]) or "none"
    raise CheckpointError(f"{origin} holds no tensors at {_show(wrapper)}; there are tensors at: {listed}")


def _best_fit(states: list[State], like: StateSpec, node: type[Node]) -> State:
    if len(states) == 1:
        return states[0]
    wanted = Counter(tensor.shape for tensor in like)
    keys = {(_bare(tensor.key), tensor.shape) for tensor in like}
    fits = [_fit(state, wanted, keys, node) for state in states]
    best = max(fits)
    if best == 0.0:
        return _largest([state for state in states if not state.joined] or states, node)
    near = [i for i, fit in enumerate(fits) if fit >= _NEAR * best and (fit == best or not states[i].joined)]
    near = [i for i in near if not states[i].joined] or near
    near.sort(key=lambda i: (states[i].averaged, -fits[i], i))
    return _chosen([states[i] for i in near], "fit the model")


def _fit(state: State, wanted: Counter[tuple[int, ...]], keys: set[tuple[str, tuple[int, ...]]], node: type[Node]) -> float:
    shapes = {key: node.shape(tensor) for key, tensor in state.tensors.items()}
    total = len(shapes) + wanted.total()
    same_shape = (Counter(shapes.values()) & wanted).total()
    same_key = len(keys & {(_bare(key), shape) for key, shape in shapes.items()})
    return 2 * (same_shape + same_key) / total


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _largest(states: list[State], node: type[Node]) -> State:
    sizes = [sum(_elements(node.shape(tensor)) for tensor in state.tensors.values()) for state in states]
    direct = [i for i, state in enumerate(states) if not state.joined]
    tree = [i for i, state in enumerate(states) if state.joined]
    if tree and not any("." in key for i in direct for key in states[i].tensors):
        return states[max(tree, key=lambda i: (sizes[i], len(states[i].path)))]
    best = max(sizes[i] for i in direct)
    near = sorted((i for i in direct if sizes[i] * 2 >= best), key=lambda i: (states[i].averaged, -sizes[i], i))
    return _chosen([states[i] for i in near], "may be meant")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _chosen(near: list[State], why: str) -> State:
    first, *rest = near
    if not rest:
        return first
    listed = " and ".join(_show(state.path) for state in near)
    note = (
        f"{len(near)} sets of weights {why}: {listed}; took {_show(first.path)} (raw weights before averages, "
        f"then the best fit, then file order); for another one open the checkpoint with wrapper={rest[0].path!r}"
    )
    first.notes = (*first.notes, note)
    return first


def _show(path: tuple[str, ...]) -> str:
    return ascii(".".join(path)) if path else "the top level"


def _nothing(root: Any, node: type[Node], found: _Found, origin: str, needs_code: tuple[str, ...]) -> CheckpointError:
    if needs_code:
        return UnsafeCheckpointError(
            f"{origin} holds no plain tensors, but objects that only code can build: {', '.join(map(ascii, needs_code[:5]))}; "
            "save model.state_dict() instead, or pass trust=True if you know who made the file"
        )
    if found.odd_keys:
        key = found.odd_keys[0]
        return CheckpointError(
            f"key {ascii(key)[:60]} of {origin} is {type(key).__name__}, not a string; pass the mapping of names to tensors"
        )
    if found.optimizers:
        return CheckpointError(
            f"{origin} holds an optimizer state ({_show(found.optimizers[0])}) but no weights; pass the model's checkpoint"
        )
    if node.tensor(root, "", origin) is not None:
        return CheckpointError(f"{origin} is a single tensor, not a mapping of names to tensors")
    children = node.mapping(root)
    if children is None:
        return CheckpointError(f"{origin} is a {type(root).__name__}, not a mapping of names to tensors")
    held = ", ".join(f"{ascii(key)[:40]} ({type(value).__name__})" for key, value in list(children.items())[:5])
    return CheckpointError(f"{origin} holds no tensors, but {held or 'nothing at all'}; pass the mapping of names to tensors")
