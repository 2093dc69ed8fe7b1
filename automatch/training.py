"""A trainer's whole checkpoint under a model's new keys: weights, and every copy of them (EMA, SWA) beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from automatch.apply import convert
from automatch.mapping import KeyMapping, Match
from automatch.positions import NoUniqueOrder, place_keys
from automatch.readers import open_checkpoint
from automatch.specs import StateSpec, is_tensor, spec_of_model

if TYPE_CHECKING:
    import torch
    from torch import nn

State = dict[str, Any]
# Entries of a trainer's checkpoint that hold no copy of the weights, or that are moved by other means.
_SKIPPED = {"optimizer_states", "lr_schedulers", "loops", "hyper_parameters", "optimizer", "optimizers", "scheduler"}


def remap_copies(tree: Any, mapping: KeyMapping, model: nn.Module) -> Any:
    """The same tree of dicts and lists, with every copy of the checkpoint's weights in it under the model's keys.

    A copy is a mapping that holds every parameter of the checkpoint that feeds the model, under its key with one
    prefix or none (``module.`` in an `AveragedModel`); or a list of tensors in the order of the checkpoint's parameters.

    Args:
        tree: a checkpoint, or part of one; it is not changed.
        mapping: what feeds each model key.
        model: the model, for the order of its parameters.
    """
    return _Copies(mapping, model).walk(tree)


def complete_state(state: Mapping[str, torch.Tensor], target: StateSpec, current: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with every key of the model: tied keys repeated, and ``current`` values where ``state`` has none."""
    by_tensor = {target[key].alias_of or key: value for key, value in state.items()}
    return dict(state) | {t.key: by_tensor.get(t.alias_of or t.key, current[t.key]) for t in target if t.key not in state}


class _Copies:
    def __init__(self, mapping: KeyMapping, model: nn.Module) -> None:
        self.mapping = mapping
        self.target = spec_of_model(model)
        self.current: State = model.state_dict()
        kinds = {tensor.key: tensor.kind for tensor in self.target}
        self.parameters = [key for key, _ in model.named_parameters()]
        self.sources = {key for match in mapping.matches if kinds.get(match.target) == "parameter" for key in match.sources}

    def walk(self, tree: Any, key: Any = None) -> Any:
        if key in _SKIPPED or is_tensor(tree):
            return tree
        if isinstance(tree, Mapping):
            table = cast("Mapping[Any, Any]", tree)
            prefix = self._prefix(table)
            if prefix is not None:
                return self._renamed(table, prefix)
            if any(isinstance(value, Mapping | list | tuple) for value in table.values()):
                return {name: self.walk(value, name) for name, value in table.items()}
        if isinstance(tree, list):
            return self._reordered(cast("list[Any]", tree))
        return tree

    def _prefix(self, table: Mapping[Any, Any]) -> str | None:
        """What stands before the checkpoint's keys in ``table``, or None where it is no copy of the weights."""
        if not self.sources or not all(isinstance(key, str) for key in table):
            return None
        first = min(self.sources, key=len)
        for name in table:
            prefix = name.removesuffix(first)
            if prefix + first == name and self._holds_all(table, prefix):
                return prefix
        return None

    def _holds_all(self, table: Mapping[str, Any], prefix: str) -> bool:
        spec = self.mapping.source.spec
        for key in self.sources:
            value = table.get(prefix + key)
            if not is_tensor(value) or (spec is not None and tuple(cast(Any, value).shape) != spec[key].shape):
                return False
        return True

    def _renamed(self, table: Mapping[str, Any], prefix: str) -> State:
        spec = self.mapping.source.spec
        known = {key for match in self.mapping.matches for key in match.sources} | set(spec.keys if spec else ())
        inner = {key: table[prefix + key] for key in known if is_tensor(table.get(prefix + key))}
        matches = [match for match in self.mapping.matches if all(key in inner for key in match.sources)]
        state = self._converted(inner, matches)
        if len(matches) == len(self.mapping.matches):  # a copy of everything, not of the parameters alone
            state = complete_state(state, self.target, self.current)
        rest = {key: value for key, value in table.items() if not (key.startswith(prefix) and key.removeprefix(prefix) in known)}
        return {prefix + key: value for key, value in state.items()} | rest

    def _reordered(self, items: list[Any]) -> list[Any]:
        if not items or not all(is_tensor(item) for item in items):
            return [self.walk(item) for item in items]
        try:
            placed = place_keys(self.mapping, self.parameters, [tuple(item.shape) for item in items])
        except NoUniqueOrder:
            return items
        if len(placed) != len(items):
            return items
        fed = [match for match in self.mapping.matches if match.target in set(self.parameters)]
        state = self._converted({key: items[position] for key, position in placed.items()}, fed)
        return [state[key] for key in self.parameters if key in state]

    def _converted(self, inner: State, matches: list[Match]) -> State:
        with open_checkpoint(inner, wrapper=()) as checkpoint:
            return dict(convert(matches, checkpoint, self.target, self.current))
